"""Merged weights on disk: folders that are either complete or absent, and which of them are kept."""
