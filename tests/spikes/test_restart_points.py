"""Which restart points are kept, and which are trusted."""

import torch

from pretrain_merge.spikes.restart_points import RestartPoints


def _points(*, keep: int = 1, until: int = 200) -> RestartPoints:
    points = RestartPoints(distrust=50, keep=keep)
    _add(points, range(0, until + 1, 20))
    return points


def _add(points: RestartPoints, steps: range) -> None:
    for step in steps:
        points.add(step, lambda: {"weight/w": torch.zeros(1)}, {})


def test_the_newest_that_is_old_enough_is_trusted() -> None:
    points = _points()
    assert points.steps == (140, 160, 180, 200)
    assert [point.step for point in points.trusted(195)] == [140]
    assert [point.step for point in points.trusted(215)] == [160]


def test_where_none_is_old_enough_the_oldest_is() -> None:
    assert [point.step for point in _points(until=0).trusted(30)] == [0]
    assert _points(until=0).trusted(0) == ()


def test_the_newest_from_before_an_onset_is_there_besides() -> None:
    points = _points()
    assert points.newest_before(195).step == 180
    assert points.newest_before(180).step == 160
    assert points.newest_before(140) is None


def test_one_that_did_not_help_is_kept_for_want_of_another_only() -> None:
    points = _points()
    points.forget(181, 205)
    points.mark_used(180)
    assert points.steps == (140, 160, 180)
    _add(points, range(220, 261, 20))
    assert points.steps == (160, 220, 240, 260)
    assert [point.step for point in points.trusted(250)] == [160]
    _add(points, range(280, 281))
    assert points.steps[0] == 220  # one from after it, and old enough by now
