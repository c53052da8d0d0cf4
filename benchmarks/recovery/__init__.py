"""Runs that diverge and are taken back by `SpikeRecovery` with its defaults, each beside a run that never diverged.

`python -m benchmarks.recovery` trains what is missing of its mechanisms, models and seeds, and prints how
many ended within 1% of their controls.
"""
