"""Merging checkpoints on disk: whole processes side by side, the sums beside other ones, and kills."""
