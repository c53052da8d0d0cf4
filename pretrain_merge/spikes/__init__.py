"""Loss spikes and collapses: when one began, and what a run can go back to."""

from pretrain_merge.spikes.detector import READ_EVERY, Onset, SpikeDetector, find_onsets

__all__ = ["READ_EVERY", "Onset", "SpikeDetector", "find_onsets"]
