"""Where the bytes of snapshots live during training. A store knows slots; it knows no steps and no coefficients."""
