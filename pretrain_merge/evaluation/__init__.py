"""Raw and merged weights measured on the same batches, without the run noticing."""
