"""A run that is killed inside slot writes, merges and saves is, once it has ended, the run that nothing happened to.

At chosen moments, the same every time. `python -m benchmarks.faults` does it hundreds of times at random ones.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.faults.signals import CHOSEN

ROOT = Path(__file__).parents[1]


def test_a_run_that_was_killed_many_times_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--chosen", "--json", str(tmp_path / "rows.json")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["times"], row["runs"]) == (len(CHOSEN), 1)  # every kill came
    assert (row["differences"], row["unexplained"]) == (0, 0)
