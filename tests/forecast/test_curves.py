"""Curves give back the river and the noise of runs in which both are known."""

from dataclasses import replace

import numpy as np
import pytest
from forecast.synthetic import MEMORY, NOISE, left, mean_loss, record, river, run

from pretrain_merge.forecast.curves import Curves
from pretrain_merge.forecast.history import read_history
from pretrain_merge.forecast.noise import left_by_mean, left_by_samples


def curves(**options):
    return Curves(read_history(run(**options), "val_loss"))


def lowered(item, by, *, views=None):
    """The record with these of its merged losses lower, by default all."""
    chosen = item.views if views is None else views
    losses = {name: {"val_loss": loss["val_loss"] - by * (name in chosen)} for name, loss in item.views.items()}
    return replace(item, views=losses)


@pytest.mark.parametrize(("number", "gap"), [(2, 0.5), (7, 1.0), (11, 2.5), (37, 0.25)])
def test_noise_left_by_samples_is_the_mean_of_their_covariances(number, gap):
    times = gap * np.arange(number)
    oracle = np.exp(-np.abs(times[:, None] - times)).mean()
    assert left_by_samples(number, gap) == pytest.approx(oracle, rel=1e-12)


@pytest.mark.parametrize("length", [1e-4, 0.01, 1.0, 30.0])
def test_noise_left_by_a_continuous_mean_is_the_limit_of_many_samples(length):
    times = np.linspace(0, length, 2001)
    oracle = np.exp(-np.abs(times[:, None] - times)).mean()
    assert left_by_mean(length) == pytest.approx(oracle, rel=2e-3)


def test_the_memory_of_the_test_is_that_of_the_package():
    from pretrain_merge.forecast import noise as module

    assert module.MEMORY == MEMORY


def test_the_trend_of_the_raw_loss_passes_through_a_smooth_run():
    known = curves(last=2000)
    for step in (1200, 1500, 2000):
        assert known.raw_at(step) == pytest.approx(river(step) + NOISE, rel=2e-4)
    assert known.raw_noise < 1e-3


def test_the_noise_is_how_far_raw_lies_above_its_means():
    known = curves(last=4000, every=100, merge_every=200, spans=(2, 8, 16))
    above = river(4000 - 350) + NOISE - mean_loss(np.arange(3300, 4001, 100))
    assert known.noise == pytest.approx(above, rel=1e-2)
    assert 0.8 * NOISE < known.noise < NOISE


@pytest.mark.parametrize("span", [150.0, 250.0, 350.0])
def test_a_mean_over_a_span_lies_half_of_it_back_with_the_noise_of_every_iterate(span):
    known = curves(last=4000, spans=(2, 4, 6, 8))
    oracle = river(4000 - span / 2) + NOISE * left(np.arange(span + 1))
    as_sampled = river(4000 - span / 2) + NOISE * left(np.arange(0, span + 1, 50))
    assert known.merged(span, 4000) == pytest.approx(oracle, rel=2e-3)
    assert as_sampled - oracle > 2e-3 * oracle  # what would be read without the correction


def test_between_merge_points_a_mean_is_interpolated_and_before_the_first_unknown():
    known = curves(last=4000)
    assert river(4000 - 75) < known.merged(150, 3950) < known.merged(150, 3900)
    assert np.isnan(known.merged(350, 100))
    assert np.isnan(known.merged(1000, 4000))


def test_between_distant_merge_points_a_mean_lies_on_the_curve_and_not_on_a_chord_above_it():
    known = curves(last=4000, merge_every=1000, noise=0.0)
    assert known.merged(150, 3500) == pytest.approx(river(3500 - 75), rel=1e-6)


def test_a_span_that_was_measured_lately_alone_falls_on_as_its_halves_do():
    records = [*run(last=3900, spans=(2, 4)), record(4000, spans=(2, 4, 8))]
    fall, doubt = Curves(read_history(records, "val_loss")).fall(350, to=4400)
    assert fall == pytest.approx(river(4000 - 175) - river(4400), rel=1e-3)
    assert doubt < fall / 100


@pytest.mark.parametrize("to", [3600, 3925, 4400])
def test_the_merged_loss_falls_on_as_the_river_does(to):
    fall, doubt = curves(last=4000).fall(150, to=to)
    assert fall == pytest.approx(river(4000 - 75) - river(to), rel=2e-3, abs=1e-12)
    assert doubt < abs(fall) / 100 + 1e-12


def test_halves_of_a_short_span_keep_more_noise_than_the_whole():
    gap, moved = curves(last=4000, every=10, merge_every=20, spans=(2, 3, 5, 9)).halves_above_whole(80)
    oracle = NOISE * (left(np.arange(41)) - left(np.arange(81)))
    assert gap == pytest.approx(oracle, abs=0.1 * oracle)
    assert gap > 10 * abs(curves(last=4000, noise=0.0).halves_above_whole(150)[0])
    assert moved < gap / 100


def test_an_unsteady_gap_is_that_of_late_and_says_how_far_the_newest_one_is():
    steady = run(last=4000, every=10, merge_every=20, spans=(2, 3, 5, 9))
    newest = lowered(steady[-1], 0.1, views=["sma9"])
    before, _ = Curves(read_history(steady, "val_loss")).halves_above_whole(80)
    gap, moved = Curves(read_history([*steady[:-1], newest], "val_loss")).halves_above_whole(80)
    assert before + 0.1 / 50 < gap < before + 0.1 / 5
    assert moved == pytest.approx(before + 0.1 - gap, rel=1e-2)


def test_a_loss_that_fell_faster_of_late_falls_on_faster_and_in_doubt():
    steady = run(last=4000)
    steeper = [lowered(item, 1e-5 * max(0, item.step - 3400)) for item in steady]
    (fall, _), (faster, doubt) = (
        Curves(read_history(records, "val_loss")).fall(350, to=4400) for records in (steady, steeper)
    )
    assert faster > fall + 0.002
    assert doubt > 0.3 * (faster - fall)


def test_a_line_through_two_points_is_in_doubt_though_it_goes_through_both():
    fall, doubt = curves(last=4000, merge_every=2000).fall(350, to=4400)
    assert doubt == pytest.approx(fall / 3, rel=1e-6)


def test_shorter_means_that_fell_faster_of_late_tell_of_the_slope_too():
    steady = run(last=4000)
    steeper = [lowered(item, 1e-5 * max(0, item.step - 3400), views=["sma2", "sma4"]) for item in steady]
    fall, faster = (Curves(read_history(records, "val_loss")).fall(350, to=4400)[0] for records in (steady, steeper))
    assert faster > fall + 0.001


def test_few_snapshots_add_noise_and_block_means_none():
    assert curves(last=4000).sampling_noise(50) > curves(last=4000).sampling_noise(350) > 0
    assert curves(last=4000, average="block").sampling_noise(100) == 0
