"""Lightning callbacks: hooks to the parts below, and nothing that a plain loop could not have."""

from pretrain_merge.callbacks.model_merging import ModelMerging

__all__ = ["ModelMerging"]
