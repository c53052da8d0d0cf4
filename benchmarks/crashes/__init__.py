"""Breaks runs in many ways and compares what they end with, bit for bit, with a run that nothing happened to.

`training` is what runs, `processes` starts and breaks it, `run` is one run through all its breaks, `compare` says what
differs at its end, `corruption` and `full_disk` damage files and the disk, and the command line prints the counts.
"""
