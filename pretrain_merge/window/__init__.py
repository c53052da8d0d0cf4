"""What a snapshot holds, which are held, and what breaks the stretch that may be merged."""
