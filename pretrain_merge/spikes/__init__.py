"""Loss spikes and collapses: when one began."""

from pretrain_merge.spikes.detector import Onset, SpikeDetector, find_onsets

__all__ = ["Onset", "SpikeDetector", "find_onsets"]
