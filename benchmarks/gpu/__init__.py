"""Everything that can only be known on a CUDA device, measured by one command in under six minutes.

Each part is a module with `LIMIT` (seconds) and `measure(setting, report)`. A part knows what it measures and what the
plan says of it; it knows neither the other parts nor how results are shown.
"""
