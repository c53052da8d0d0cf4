"""What a sweep evaluates where: windows, intervals and breaks, against plain lists."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_merge.config import parse_window_settings
from pretrain_merge.errors import ConfigError
from pretrain_merge.offline.schedule import merge_points, nested_views, swept_views
from pretrain_merge.offline.tensors import Dtype, Kind, Source

KIND = {"w": Kind((2,), Dtype("float32", 4))}


def checkpoints(rates, first=10):
    return [
        Source(
            f"step={first * number}", "test", KIND, list, (), step=first * number, lr=() if rate is None else (rate,)
        )
        for number, rate in enumerate(rates, 1)
    ]


def points(sources, *, window=4, views=("sma",), intervals=(1,), **keys):
    parsed = parse_window_settings({"window": window, "views": list(views), "every": 10} | keys)
    return merge_points(sources, swept_views(parsed.views, intervals, window), parsed)


def stretches(rates, **keys):
    """Numbers of the checkpoints that are valid at each point."""
    return [[index + 1 for index in point.valid] for point in points(checkpoints(rates), window=9, **keys)]


def test_a_rate_that_falls_leaves_the_checkpoint_at_its_edge_to_neither_side():
    # the rate in the fourth is that of the step to come: whether its own last step used it is not known
    assert stretches([3, 3, 3, 1, 1, 1]) == [[1, 2], [1, 2, 3], [5, 6]]


def test_a_rate_that_rises_begins_a_stretch_with_the_checkpoint_that_has_it():
    assert stretches([1, 2, 3, 3, 3]) == [[3, 4], [3, 4, 5]]


def test_a_slow_drift_adds_up_to_a_break():
    assert stretches([1.0, 0.9996, 0.9992, 0.9988, 0.9984, 0.998, 0.998]) == [[1, 2], [1, 2, 3], [5, 6], [5, 6, 7]]


def test_breaks_can_be_off_and_files_without_rates_have_none():
    everything = [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert stretches([4, 3, 2, 1], breaks={"lr": False}) == everything
    assert stretches([None] * 4) == everything


def test_a_run_whose_rate_decays_is_told_how_to_be_swept():
    with pytest.raises(ConfigError, match=r"one rate \(4 at step 10.*breaks: \{lr: false\}"):
        points(checkpoints([4, 3, 2, 1]))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(2, 6), st.integers(3, 14))
def test_a_view_of_wider_intervals_is_every_so_many_th_back_from_the_newest(window, interval, number, num_checkpoints):
    if number > window:
        return
    sources = checkpoints([None] * num_checkpoints)
    for point in points(sources, window=window, views=["sma", f"sma{number}"], intervals=[1, interval]):
        held = list(range(max(0, point.newest - window + 1), point.newest + 1))
        assert list(point.valid) == held
        name = f"sma{number}" if interval == 1 else f"sma{number}-every{interval}"
        reach = (number - 1) * interval + 1
        if reach > window:
            assert name not in {*point.merges, *point.skipped}
        elif reach > len(held):
            assert str(number if interval == 1 else reach) in point.skipped[name]
        else:
            indices, recipe = point.merges[name]
            assert list(indices) == [point.newest - back * interval for back in reversed(range(number))]
            assert recipe.steps == tuple(sources[index].step for index in indices)
            assert recipe.coefficients == (1 / number,) * number


def test_wider_intervals_of_a_decay_count_its_own_steps():
    (_, recipe) = points(
        checkpoints([None] * 5), window=5, views=["wsm", {"name": "d", "kind": "decay", "shape": "linear", "last": 3}],
        intervals=[2], merge_every=50,
    )[-1].merges["d-every2"]  # fmt: skip
    assert recipe.steps == (10, 30, 50)
    assert recipe.coefficients == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize(
    ("window", "views"),
    [
        (2, ["sma2", "sma", "wsm"]),
        (4, ["sma2", "sma4", "sma", "wsm"]),
        (10, ["sma2", "sma4", "sma8", "sma10", "sma", "wsm"]),
    ],
)
def test_views_that_nobody_named_are_nested(window, views):
    assert nested_views(window) == views


def test_merge_points_and_the_start_are_those_of_the_callback():
    sources = checkpoints([None] * 10)
    assert [point.newest + 1 for point in points(sources, merge_every=30, start=25)] == [6, 9]
