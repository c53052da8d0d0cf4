"""The back-test of the forecasts: its rows, and the calibration that ships, made again from the suite."""

import json
import math

from benchmarks.annealing.records import read_calibrated
from benchmarks.forecast import external
from benchmarks.forecast.__main__ import main, source_of
from benchmarks.forecast.cases import read_cases
from benchmarks.forecast.splits import calibrated
from pretrain_merge.forecast.calibration import SHIPPED, shipped

KEYS = {"method", "split", "median", "p90", "worst", "bias", "coverage", "n", "watching", "kind"}


def test_the_calibration_that_ships_is_what_its_runs_give_bit_for_bit(tmp_path):
    suite = read_calibrated()
    again = calibrated(read_cases(suite), source_of(suite))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == SHIPPED.read_bytes()


def test_nothing_is_fitted_to_the_logs_of_others_and_their_anneals_are_read_closely():
    ours, merged, _ = external.rows(shipped())
    assert ours["n"] == 25
    assert ours["median"] < 0.0017
    assert ours["median"] < merged["median"] / 4
    assert ours["coverage"] >= 0.88
    assert ours["width"] < 0.014


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
