"""Which records a forecast reads together, and which it refuses."""

import dataclasses
import math

import numpy as np
import pytest
from forecast.synthetic import record, run

from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast import history as module
from pretrain_merge.forecast import points
from pretrain_merge.forecast.history import RunHistory, read_history
from pretrain_merge.forecast.points import MOST
from pretrain_merge.records import MergeRecord, Recipe


def short(step, **changes):
    """A record of one mean of two, quickly made."""
    mean = {"sma2": {"val_loss": 2.0 + 3.0 / step}}
    recipes = {"sma2": Recipe((step - 50, step), (0.5, 0.5))}
    fields = {"raw": {"val_loss": 2.1 + 3.0 / step}, "views": mean, "recipes": recipes, "lr": (1e-3,)}
    return MergeRecord("merge", step, 0, 0, 2, 0.1, **fields | changes)


def steps(history):
    return history.steps.tolist()


def spans(history, index=-1):
    return [mean.span for mean in history.means_at(index)]


def test_all_records_of_a_run_at_one_learning_rate_are_read():
    history = read_history(run(500), "val_loss")
    assert steps(history) == [100, 200, 300, 400, 500]
    assert history.why_short == ""
    assert spans(history) == [50.0, 150.0, 350.0]
    assert [mean.number for mean in history.means_at(-1)] == [2, 4, 8]


def test_block_means_reach_one_interval_further_back():
    history = read_history(run(500, average="block"), "val_loss")
    assert spans(history) == [100.0, 200.0, 400.0]


def test_only_plain_means_are_read():
    newest = record(400)
    steps_of = newest.recipes["sma4"].steps
    uneven = dataclasses.replace(newest, recipes={**newest.recipes, "sma4": Recipe(steps_of, (0.4, 0.3, 0.2, 0.1))})
    assert spans(read_history([uneven], "val_loss")) == [50.0, 350.0]


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
    assert [spans(history, index) for index in range(3)] == [[], [50.0], [50.0, 150.0]]


def test_records_before_a_break_are_not_read():
    records = [record(step, since=350 if step > 350 else 0) for step in range(100, 601, 100)]
    history = read_history(records, "val_loss")
    assert steps(history) == [400, 500, 600]
    assert history.why_short == "there was a break at step 350"


def test_a_rate_within_a_thousandth_is_the_same():
    records = [record(step, lr=(1e-3 * (1 + 5e-4 * (step == 100)),)) for step in (100, 200)]
    assert steps(read_history(records, "val_loss")) == [100, 200]


@pytest.mark.parametrize("metric", ["accuracy", "val_acc", "val/acc_top1", "perplexity", "ppl", "val_f1", "bleu"])
def test_a_metric_that_is_not_a_loss_by_its_name_is_refused(metric):
    with pytest.raises(ForecastError, match=r"not a loss by its name.*Measure and name one"):
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


def test_what_a_forecast_reads_of_a_long_run_has_a_bound_and_keeps_its_ends():
    history = RunHistory("val_loss")
    for step in range(50, 50 * (2 * MOST + 40), 50):
        history.append(short(step))
        if step == 50 * MOST:
            assert steps(history.now()) == list(range(50, step + 1, 50))  # all of them up to here
    now = history.now()
    assert len(now.steps) <= MOST + 1
    assert (now.steps[0], now.steps[-1]) == (50, 50 * (2 * MOST + 39))
    assert set(np.diff(now.steps[:-1])) == {4 * 50.0}
    assert now.num_merges == 2 * MOST + 39
    assert spans(now) == [50.0]


def test_a_thinned_run_is_read_alike_as_it_comes_and_afterwards(monkeypatch):
    monkeypatch.setattr(points, "MOST", 8)
    history, records = RunHistory("val_loss"), []
    for step in range(50, 2001, 50):
        records.append(short(step))
        history.append(records[-1])
        again, now = read_history(records, "val_loss"), history.now()
        assert steps(again) == steps(now)
        np.testing.assert_array_equal(again.means, now.means)


def test_a_break_ends_the_thinning_of_what_was_before():
    history = RunHistory("val_loss")
    for step in range(50, 50 * (MOST + 100), 50):
        history.append(short(step))
    for step in range(200_000, 200_501, 100):
        history.append(short(step, since=199_950))
    assert steps(history.now()) == list(range(200_000, 200_501, 100))


def test_one_merge_more_reads_one_record_more(monkeypatch):
    history, read = RunHistory("val_loss"), []
    monkeypatch.setattr(module, "_means", lambda record, metric: read.append(record.step) or [])
    for step in range(50, 5001, 50):
        history.append(short(step))
        history.now()
    assert read == list(range(50, 5001, 50))


def test_a_resumed_run_computes_the_means_of_the_points_that_stay_only(monkeypatch):
    monkeypatch.setattr(points, "MOST", 8)
    read, means = [], module._means
    monkeypatch.setattr(module, "_means", lambda record, metric: read.append(record.step) or means(record, metric))
    records = [short(step) for step in range(50, 50 * 1025, 50)]
    history = read_history(records, "val_loss")
    assert len(read) <= 60  # of 1,024: eight, and half as many for each doubling
    assert steps(history)[-1] == 50 * 1024
    assert spans(history) == [50]


def test_a_slow_decay_of_the_rate_is_left_where_it_adds_up_to_another_rate():
    records = [short(step, lr=(1e-3 * (1 - 4e-6 * step),)) for step in range(50, 1001, 50)]
    history = read_history(records, "val_loss")
    newest = records[-1].lr[0]
    assert steps(history) == [record.step for record in records if record.lr[0] - newest <= 1e-3 * record.lr[0]]
    assert 2 < len(history.steps) < len(records)
    assert "learning rate was" in history.why_short
