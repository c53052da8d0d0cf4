"""Checkpoints that are on disk already: merged by streaming, exported, and swept. No trainer is needed."""
