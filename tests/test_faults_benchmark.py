"""The short version of `benchmarks.faults`: breaks a few runs and finds no difference."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_broken_runs_end_as_the_uninterrupted_one(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--json", str(path), "--folder", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = json.loads(path.read_text())
    assert {row["what"].partition(":")[0] for row in rows} == {"SIGKILL", "SIGTERM", "full disk", "corruption"}
    assert all(row["times"] and row["runs"] and not row["differences"] and not row["unexplained"] for row in rows)
