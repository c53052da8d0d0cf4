"""The back-test of the forecasts: its rows, and the calibration that ships, made again from the suite."""

import json
import math

import pytest

from benchmarks.annealing.records import read_suite
from benchmarks.forecast.__main__ import main, source_of
from benchmarks.forecast.cases import read_cases
from benchmarks.forecast.splits import calibrated
from pretrain_merge.forecast.calibration import shipped

KEYS = {"method", "split", "median", "p90", "worst", "bias", "coverage", "n", "watching", "kind"}


def test_the_calibration_that_ships_is_what_the_suite_gives():
    suite = read_suite()
    again = calibrated(read_cases(suite), source_of(suite))
    assert again.source == shipped().source
    assert again.coefficients == pytest.approx(shipped().coefficients, abs=1e-6)
    assert again.quantiles == pytest.approx(shipped().quantiles, rel=1e-6)
    assert (again.num_runs, again.longest, again.shares) == (24, shipped().longest, pytest.approx(shipped().shares))


def test_the_fresh_runs_are_judged_by_the_calibration_as_it_is(tmp_path, capsys):
    before = shipped()
    main(["--fresh", "--only", "stdlib-long", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row.keys() >= KEYS for row in rows)
    methods = {row["method"] for row in rows if row["split"] == "fresh runs"}
    assert {"forecaster", "raw", "merged"} < methods  # and a published law
    assert shipped() is before
    (nowcast,) = (
        row
        for row in rows
        if (row["method"], row["split"], row["watching"], row["kind"])
        == ("forecaster", "fresh runs", "dense", "nowcast")
    )
    assert nowcast["n"] == 24
    assert 0 < nowcast["median"] < nowcast["p90"] <= nowcast["worst"] < 0.05
    assert math.isfinite(nowcast["width"])
    assert "dense" in capsys.readouterr().out
