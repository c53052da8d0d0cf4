"""Which view is best, and by how much more than chance: against simulated series whose error is known."""

import math
import random
import statistics

import pytest

from pretrain_merge.errors import ConfigError
from pretrain_merge.offline.comparison import compare, difference
from pretrain_merge.records import MergeRecord, Recipe


def record(step, raw, **views):
    recipes = {view: Recipe((step - ord(view) / 1000, step), (0.5, 0.5)) for view in views}
    return MergeRecord(
        "merge", step, 0, 0, 2, 0.0, {"val_loss": raw}, {view: {"val_loss": v} for view, v in views.items()}, recipes
    )


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_the_standard_error_is_that_of_series_whose_neighbours_are_alike(correlation):
    drawn = random.Random(1)
    means, errors = [], []
    for _ in range(400):
        values, last = [], drawn.gauss(0, 1)
        for _ in range(60):
            last = correlation * last + math.sqrt(1 - correlation**2) * drawn.gauss(0, 1)
            values.append(last)
        found = difference(values)
        means.append(found.mean)
        errors.append(found.standard_error)
    assert statistics.median(errors) == pytest.approx(statistics.stdev(means), rel=0.15)


def test_few_or_equal_values_have_no_standard_error():
    for values in ([1.0], [1.0, 2.0], [1.0, 1.0, 1.0, 1.0]):
        assert math.isnan(difference(values).standard_error)
        assert difference(values).to_plain()["standard_error"] is None


def test_views_are_compared_at_the_points_that_all_of_them_have():
    records = [
        record(10, 3.0, a=1.0),  # where b is not ready yet, a would win
        *[record(step, 3.0, a=2.5 + step / 1e4, b=2.0) for step in (20, 30, 40, 50)],
    ]
    found = compare(records, "val_loss", larger_is_better=False)
    assert (found.best, found.next) == ("b", "a")
    assert found.gains["b"].mean == pytest.approx(1.0)
    assert found.gains["a"].num_points == 4
    assert found.margin.mean == pytest.approx(0.5035)
    assert found.is_clear


def test_a_larger_metric_can_be_the_better_one_and_nan_never_is():
    records = [record(step, 0.5, a=0.6, b=0.7, c=math.nan) for step in (10, 20, 30)]
    found = compare(records, "val_loss", larger_is_better=True)
    assert (found.best, list(found.gains)[-1]) == ("b", "c")
    assert compare(records, "val_loss", larger_is_better=False).best == "a"


def test_a_view_that_is_the_same_merge_is_no_rival():
    same = [
        MergeRecord(
            "merge", step, 0, 0, 2, 0.0, {"val_loss": 3.0},
            {"sma": {"val_loss": 2.0}, "sma2": {"val_loss": 2.0}, "wsm": {"val_loss": 2.5}},
            {"sma": Recipe((1, 2), (0.5, 0.5)), "sma2": Recipe((1, 2), (0.5, 0.5)), "wsm": Recipe((1, 2), (0.3, 0.7))},
        )
        for step in (10, 20, 30)
    ]  # fmt: skip
    found = compare(same, "val_loss", larger_is_better=False)
    assert (found.best, found.next) == ("sma", "wsm")


def test_a_metric_that_nobody_measured_is_refused():
    with pytest.raises(ConfigError, match=r"metric: 'loss' was not measured of a merge\. Measured: val_loss"):
        compare([record(10, 1.0, a=1.0)], "loss", larger_is_better=False)


def test_a_view_that_hardly_a_point_has_is_left_out_so_that_the_others_are_compared_at_more():
    records = [
        record(10, 3.0, a=2.5),
        *[record(step, 3.0, a=2.5 + step / 1e4, b=2.0) for step in (20, 30, 40)],
        record(50, 3.0, a=2.5, b=2.0, c=1.0),
    ]
    found = compare(records, "val_loss", larger_is_better=False)
    assert (found.best, found.next, found.left_out) == ("b", "a", ("c",))
    assert found.gains["b"].num_points == 4
    # one view for which there are no other points is compared all the same
    assert compare(records[-1:], "val_loss", larger_is_better=False).left_out == ()
