"""Real annealing runs: the truth that forecasts are calibrated on and tested against.

    python -m benchmarks.annealing            trains what is missing in benchmarks/annealing/records/
    python -m benchmarks.annealing --list     what there is, and what is done

`setups` says what is trained, `texts` on which text, `training` how a run and its branches go, `records` how the result
is kept and read. Reading needs neither torch nor Lightning.
"""
