"""Records: one line of JSON per merge that reads back equal, under names that every logger and plot shares."""

import dataclasses
import json
import math
import re

import pytest
from harness import strategies
from harness.records import RECORD, plain
from hypothesis import given

from pretrain_merge.records import Expected, MergeRecord, gaps_closed, metric_name


def test_metrics_have_the_names_that_charts_overlay():
    assert RECORD.metrics() == {
        "merge/raw/val_loss": 2.0,
        "merge/sma/val_loss": 1.5,
        "merge/sma/span": 300.0,
        "merge/sma2/val_loss": 1.75,
        "merge/step": 400.0,
        "merge/tokens": 409_600.0,
        "merge/window": 4.0,
        "merge/spread": 0.25,
    }


def test_tokens_are_no_metric_where_the_run_does_not_count_them():
    assert "merge/tokens" not in dataclasses.replace(RECORD, tokens=0).metrics()


def test_the_name_of_an_instance_prefixes_every_metric():
    renamed = dataclasses.replace(RECORD, name="long")
    assert all(key.startswith("long/") for key in renamed.metrics())
    assert metric_name("long", "sma", "val_loss") in renamed.metrics()


@given(strategies.records)
def test_a_record_reads_back_equal_from_one_line_of_strict_json(record):
    line = record.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert plain(MergeRecord.from_json(line)) == plain(record)


def test_text_that_reads_nan_stays_text():
    record = dataclasses.replace(RECORD, phase="NaN", skipped={"sma8": "Infinity"})
    assert MergeRecord.from_json(record.to_json()) == record


def test_a_metric_that_is_not_finite_is_kept_and_readable():
    record = dataclasses.replace(RECORD, raw={"val_loss": math.inf}, views={"sma": {"val_loss": math.nan}})
    read = MergeRecord.from_json(record.to_json())
    assert read.raw["val_loss"] == math.inf
    assert math.isnan(read.views["sma"]["val_loss"])


def with_forecast(high, raw=2.0, sma=1.9):
    forecasts = {"now": {"val_loss": Expected(1.8, 1.7, high, 400)}}
    return dataclasses.replace(RECORD, raw={"val_loss": raw}, views={"sma": {"val_loss": sma}}, forecasts=forecasts)


def test_the_gap_that_a_view_closes_is_its_share_of_the_way_from_raw_to_the_forecast():
    assert gaps_closed(with_forecast(high=1.9)) == {"sma": {"now": pytest.approx(0.5)}}
    metrics = with_forecast(high=1.9).metrics()
    assert metrics["merge/sma/gap_closed/now"] == pytest.approx(0.5)
    assert metrics["merge/forecast/now/step"] == 400


@pytest.mark.parametrize("high", [2.0, 2.1, math.nan])
def test_there_is_no_gap_where_the_forecast_may_be_no_better_than_raw(high):
    assert gaps_closed(with_forecast(high)) == {}


def test_no_gap_is_drawn_into_the_chart_of_the_metric():
    in_chart = re.compile(r"merge/.*/val_loss")  # the pattern that the docs give for W&B
    found = [key for key in with_forecast(high=1.9).metrics() if in_chart.search(key)]
    assert found == ["merge/raw/val_loss", "merge/sma/val_loss"] + [
        f"merge/forecast/now/val_loss{end}" for end in ("", "/low", "/high")
    ]
