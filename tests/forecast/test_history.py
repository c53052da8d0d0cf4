"""Which records a forecast reads together, and which it refuses."""

import dataclasses
import math

import pytest
from forecast.synthetic import record, run

from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.history import read_history
from pretrain_merge.records import Recipe


def steps(history):
    return [point.step for point in history.points]


def test_all_records_of_a_run_at_one_learning_rate_are_read():
    history = read_history(run(500), "val_loss")
    assert steps(history) == [100, 200, 300, 400, 500]
    assert history.why_short == ""
    assert list(history.points[-1].means) == [50.0, 150.0, 350.0]
    assert [mean.number for mean in history.points[-1].means.values()] == [2, 4, 8]


def test_block_means_reach_one_interval_further_back():
    history = read_history(run(500, average="block"), "val_loss")
    assert list(history.points[-1].means) == [100.0, 200.0, 400.0]


def test_only_plain_means_are_read():
    newest = record(400)
    steps_of = newest.recipes["sma4"].steps
    uneven = dataclasses.replace(newest, recipes={**newest.recipes, "sma4": Recipe(steps_of, (0.4, 0.3, 0.2, 0.1))})
    assert list(read_history([uneven], "val_loss").points[-1].means) == [50.0, 350.0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lr": (2e-3,)}, "the learning rate was 0.002 at step 300 and is 0.001 now"),
        ({"lr": (1e-3, 1e-3)}, "the learning rate"),
        ({"phase": "web"}, "a new phase, '', began after step 300"),
    ],
)
def test_records_before_a_change_are_not_read_and_why_is_known(change, why):
    records = [record(step, **(change if step <= 300 else {})) for step in range(100, 1001, 100)]
    history = read_history(records, "val_loss")
    assert steps(history) == [400, 500, 600, 700, 800, 900, 1000]
    assert why in history.why_short


def test_a_mean_that_reaches_across_a_change_that_was_no_break_is_not_read():
    records = [record(step, lr=(2e-3 if step <= 300 else 1e-3,)) for step in range(100, 601, 100)]
    history = read_history(records, "val_loss")
    # the rate changed somewhere between 300 and 400: only what begins at 400 or later is surely of the new one
    assert [list(point.means) for point in history.points] == [[], [50.0], [50.0, 150.0]]


def test_records_before_a_break_are_not_read():
    records = [record(step, since=350 if step > 350 else 0) for step in range(100, 601, 100)]
    history = read_history(records, "val_loss")
    assert steps(history) == [400, 500, 600]
    assert history.why_short == "there was a break at step 350"


def test_a_rate_within_a_thousandth_is_the_same():
    records = [record(step, lr=(1e-3 * (1 + 5e-4 * (step == 100)),)) for step in (100, 200)]
    assert steps(read_history(records, "val_loss")) == [100, 200]


@pytest.mark.parametrize("metric", ["accuracy", "val_acc", "val/acc_top1", "perplexity", "ppl", "val_f1", "bleu"])
def test_a_metric_that_is_no_loss_by_its_name_is_refused(metric):
    with pytest.raises(ForecastError, match=r"no loss by its name.*Measure and name one"):
        read_history(run(500, metric=metric), metric)


@pytest.mark.parametrize("metric", ["val_loss", "nll", "val/cross_entropy", "loss_accumulated", "vacuum_bpb"])
def test_other_names_are_taken_for_losses(metric):
    assert steps(read_history(run(500, metric=metric), metric))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_that_no_loss_has_is_refused(value):
    records = [*run(400), record(500, raw={"val_loss": value})]
    with pytest.raises(ForecastError, match=r"a loss is above 0 and finite"):
        read_history(records, "val_loss")


def test_a_metric_that_rises_is_refused():
    rising = [record(step, scale=0.1 + step / 1000) for step in range(100, 1001, 100)]
    with pytest.raises(ForecastError, match=r"rose from .* to .* between steps 100 and 1000"):
        read_history(rising, "val_loss")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no merges yet"),
        ([record(100), record(200, name="late")], r"of \['late', 'merge'\]"),
        ([record(200), record(100)], "not in the order"),
        ([record(100), record(200, raw={"other": 1.0})], r"'val_loss' was not measured at step 200. Measured: other"),
    ],
)
def test_records_that_are_not_one_run_with_the_metric_are_refused(records, message):
    with pytest.raises(ForecastError, match=message):
        read_history(records, "val_loss")
