"""A run that is killed inside slot writes, merges and saves is, once it has ended, the run that nothing happened to.

At chosen moments, the same every time. `python -m benchmarks.crashes` does it hundreds of times at random ones.
"""

import json

from harness.forks import run_forked

from benchmarks.crashes.__main__ import main
from benchmarks.crashes.signals import CHOSEN


def test_a_run_that_was_killed_many_times_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    code, printed = run_forked(break_run, str(tmp_path / "rows.json"), timeout=200)
    assert code == 0, printed
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["times"], row["runs"]) == (len(CHOSEN), 1)  # every kill came
    assert (row["differences"], row["unexplained"]) == (0, 0)


def break_run(path):
    main(["--chosen", "--json", path])
