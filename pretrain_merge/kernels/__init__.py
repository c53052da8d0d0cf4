"""One weighted sum of snapshots, by three backends that keep one contract: reference, CPU, CUDA."""
