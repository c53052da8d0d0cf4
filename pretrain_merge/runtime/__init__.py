"""The process: its ranks, its signals, its log."""
