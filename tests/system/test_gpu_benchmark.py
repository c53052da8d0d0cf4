"""The command for CUDA machines, as far as a machine without one can try it. `--rehearse` as a whole takes minutes."""

import json
import math
import zipfile

import pytest
from harness.forks import run_code, run_forked

from benchmarks.gpu import results, wheels
from benchmarks.gpu.__main__ import PARTS


@pytest.fixture
def report(tmp_path):
    return results.Report(tmp_path / "rows", "part"), lambda: results.read_rows(tmp_path / "rows")


@pytest.mark.timeout(300)
def test_a_part_that_fails_or_hangs_is_reported_and_the_others_go_on(tmp_path):
    code = f"""
import pathlib
from benchmarks.gpu import __main__, processes
processes._PRELOADED.clear()  # the three parts of this test need little
folder = pathlib.Path({str(tmp_path)!r})
setting = dict(rehearses=True, predicts=False, hardware="h100", folder=folder)
seconds, error = processes.run_part("graphs", setting, folder / "graphs", 0.2)
assert "stopped after its limit" in error, error
__main__.PARTS.clear()
__main__.PARTS.update(absent=60, graphs=100)
assert __main__.main(["--rehearse", "--json", str(folder / "report.json"), "--folder", str(folder)]) == 1
"""
    status, printed = run_forked(run_code, code)
    assert status == 0, printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert "No module named" in report["parts"]["absent"]["error"]
    assert not report["parts"]["graphs"]["error"]
    assert len(report["rows"]) == 3
    assert all(row["met"] for row in report["rows"])
    assert "FAILED: ModuleNotFoundError" in printed
    assert "channels_last" in printed


def test_what_was_measured_before_a_crash_is_kept(report):
    write, read = report
    write("first", "case", 1.0)
    assert [row["what"] for row in read()] == ["first"]


def test_a_target_is_met_or_missed_and_nan_meets_nothing(report):
    write, read = report
    for value in (0.9, 0.8, math.nan):
        write("share", "", value, "%", at_least=0.85)
    write("count", "", 0, at_most=0)
    write("same", "", False)
    write("seconds", "", 1.0, "s")
    write("predicted", "", None, "s", predicted=0.5)
    assert [row["met"] for row in read()] == [True, False, False, True, False, None, None]


def test_the_table_shows_the_plans_estimate_beside_the_figure(report):
    write, read = report
    write("merge", "N=10", 0.0021, "s", predicted=0.002, at_most=0.003)
    line = results.table(read()).splitlines()[1]
    assert [cell.strip() for cell in line.split("  ") if cell] == [
        "part",
        "merge",
        "N=10",
        "2.1 ms",
        "2 ms",
        "<= 3 ms",
        "met",
    ]


def test_wheels_are_taken_for_what_is_missing_alone(tmp_path, monkeypatch):
    for name in ("absent_library-1.0-py3-none-any.whl", "numpy-0.1-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}_of_the_wheel.py", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("sys.path", __import__("sys").path.copy())
    assert wheels.use(tmp_path) == ["absent_library"]
    __import__("absent_library_of_the_wheel")
    with pytest.raises(ImportError):
        __import__("numpy_of_the_wheel")
    assert wheels.use(tmp_path / "no-such-folder") == []


def test_all_parts_fit_into_six_minutes():
    """Each limit is beyond what the part should take; what it takes longer, those after it lack."""
    from benchmarks.gpu.__main__ import _BUDGET

    assert _BUDGET < 360
    assert max(PARTS.values()) < _BUDGET / 2
