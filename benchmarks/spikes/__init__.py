"""How soon a collapse is seen, and how often a run that goes well is accused of one: `python -m benchmarks.spikes`."""
