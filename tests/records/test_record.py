"""Records: one line of JSON per merge that reads back equal, under names that every logger and plot shares."""

import dataclasses
import json
import math

import pytest
from harness import strategies
from hypothesis import given

from pretrain_merge.records import MergeRecord, Recipe, metric_name

RECORD = MergeRecord(
    name="merge",
    step=400,
    samples=3200,
    tokens=409_600,
    window=4,
    spread=0.25,
    raw={"val_loss": 2.0},
    views={"sma": {"val_loss": 1.5}, "sma2": {"val_loss": 1.75}},
    recipes={"sma": Recipe((100, 200, 300, 400), (0.25, 0.25, 0.25, 0.25))},
    skipped={"sma8": "needs 8"},
    lr=(3e-4,),
    phase="long context",
    timing={"merge": 0.01},
)


def plain(value):
    """A record as nested plain values in which NaN equals NaN."""
    return repr(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)


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
