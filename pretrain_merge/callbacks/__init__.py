"""Lightning callbacks: hooks to the parts below, and nothing that a plain loop could not have."""

from pretrain_merge.callbacks.model_merging import ModelMerging
from pretrain_merge.callbacks.spike_recovery import SpikeRecovery

__all__ = ["ModelMerging", "SpikeRecovery"]
