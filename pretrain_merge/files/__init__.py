"""Files that appear whole, carry checksums, and lock their folder. Nothing here knows a window."""
