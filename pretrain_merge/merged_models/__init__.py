"""Model files: merged weights as folders that are either complete or absent."""

from pretrain_merge.checkpoints.merged import load_merged

__all__ = ["load_merged"]
