"""The terms of the law mean what they say, and do not depend on units."""

import numpy as np
import pytest
from forecast.synthetic import MEMORY, left, record, river, run

from pretrain_merge.config import FORECAST_KINDS, FORECAST_SHAPES
from pretrain_merge.forecast.curves import Curves
from pretrain_merge.forecast.history import read_history
from pretrain_merge.forecast.law import CALIBRATED_SHAPES, DOUBTS, KINDS, TERMS, read
from pretrain_merge.forecast.quadratic import decay, typical_ratio
from pretrain_merge.lr_schedules import SHAPES


def reading(steps=300, shape="linear", kind="nowcast", **options):
    return read(Curves(read_history(run(**({"last": 4000} | options)), "val_loss")), steps, shape, kind)


def term(name, **options):
    return reading(**options).terms[TERMS.index(name)]


def test_the_configuration_allows_what_the_law_knows():
    assert set(CALIBRATED_SHAPES) <= set(FORECAST_SHAPES) <= set(SHAPES)
    assert set(FORECAST_KINDS) == set(KINDS)


def replayed(shape, length, num_steps=20_000):
    """Variance at the end of an anneal of one direction, by its recursion step by step, at 1 before it."""
    factors = np.array([SHAPES[shape]((step + 0.5) / num_steps) for step in range(num_steps)])
    forget = factors * length / num_steps
    variance = 1.0
    for rate, share in zip(factors, forget, strict=True):
        variance = (1 - share) ** 2 * variance + 2 * rate * share
    return variance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1.0, 8.0, 60.0])
def test_what_an_anneal_leaves_is_what_replaying_its_steps_leaves(shape, length):
    mean, half = (2 / x * (1 - (1 - np.exp(-x)) / x) for x in (length, length / 2))
    oracle = (replayed(shape, length) - mean) / (1 - mean)
    assert decay(shape).left((half - mean) / (1 - mean)) == pytest.approx(oracle, abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_progress_and_gain_are_integrals_of_the_learning_rate_factor(shape):
    factors = np.array([SHAPES[shape](t) for t in (np.arange(100_000) + 0.5) / 100_000])
    assert decay(shape).progress == pytest.approx(factors.mean(), rel=1e-4)
    assert decay(shape).gain == pytest.approx(12 * np.mean(factors * (1 - factors) ** 2), rel=1e-4)


def gap():
    merged = river(4000 - 150) + 0.1 * left(np.arange(301))
    return (river(4000 - 150) + 0.1 - merged) / merged


def test_the_gap_is_the_raw_trend_at_the_middle_of_the_mean_above_it():
    # a twentieth: the noise is taken a little too small, since all means keep some of it
    assert reading().gap == pytest.approx(gap(), rel=0.05)


def test_a_linear_nowcast_is_read_where_the_mean_lies_and_nothing_is_extrapolated():
    assert term("kappa") == pytest.approx(0.0, abs=1e-12)
    assert term("kappa", shape="cosine") == pytest.approx(0.0, abs=1e-6)
    assert term("kappa", shape="1-sqrt") > 0  # it makes less progress, and ends higher


def test_a_forecast_follows_the_merged_curve_to_where_the_anneal_gets():
    merged = river(4000 - 150) + 0.1 * left(np.arange(301))
    fallen = river(4000 - 150) - river(4000 + 150)  # the river of the test is a line in t^-1/2
    assert term("kappa", kind="forecast") == pytest.approx(-fallen / merged, rel=3e-3)
    later = river(4000 - 150) - river(4500 + 150)
    known = Curves(read_history(run(4000), "val_loss"))
    waited = read(known, 300, "linear", "forecast", after=500)
    assert waited.terms[TERMS.index("kappa")] == pytest.approx(-later / merged, rel=3e-3)
    assert waited.end == 4800


def test_a_linear_anneal_has_no_term_of_its_own_and_other_shapes_leave_more_or_less():
    assert term("aS") == 0.0
    assert term("aS", shape="1-sqrt") < 0 < term("aS", shape="cosine", steps=40, every=5, merge_every=20, spans=(3, 9))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_anneal_gains_in_proportion_to_its_share_of_training(shape):
    gain = decay(shape).gain * reading().gap
    assert term("c1", shape=shape) == pytest.approx(-gain * 300 / 4000)
    assert term("c1", shape=shape, kind="forecast") == pytest.approx(-gain * 300 / 4300)


def test_what_the_halves_keep_is_large_where_the_noise_is_remembered():
    close = reading(40, every=5, merge_every=20, spans=(3, 5, 9))
    oracle = 0.1 * (left(np.arange(21)) - left(np.arange(41)))
    assert close.terms[TERMS.index("aJ")] * close.base == pytest.approx(oracle * counted(40 / 4000), rel=0.15)
    assert term("aJ") / counted(300 / 4000) < 0.5 * close.terms[TERMS.index("aJ")] / counted(40 / 4000)


def counted(share):
    """Of what the halves keep, by an anneal that is this share of the steps until its end."""
    return 1 / (1 + 0.01 / share)


def test_what_the_halves_keep_counts_half_for_an_anneal_of_a_hundredth():
    options = {"every": 5, "merge_every": 20, "spans": (3, 5, 9)}
    soon, late = (
        read(Curves(read_history(run(4000, **options), "val_loss")), 40, "linear", "forecast", after=after).terms[0]
        for after in (0, 4000)
    )
    assert late / soon == pytest.approx(counted(40 / 8040) / counted(40 / 4040))


@pytest.mark.parametrize("options", [{"spans": (8,)}, {"spans": (8, 16), "last": 400}])
def test_without_a_mean_over_half_the_length_the_usual_memory_stands_for_it_and_is_doubted(options):
    reduced = reading(350, **options)
    assert reduced.is_reduced
    usual = reduced.gap * typical_ratio(350)
    assert reduced.terms[TERMS.index("aJ")] == pytest.approx(usual * counted(350 / reduced.end))
    assert reduced.doubts[DOUBTS.index("halves")] == pytest.approx(usual)
    assert not reading(350).is_reduced


def test_a_merged_loss_that_fell_otherwise_of_late_is_doubted_and_a_smooth_one_is_not():
    records = run(4000)
    dropped = [
        record(step, scale=0.9) if step > 3400 else item
        for step, item in zip(range(100, 4001, 100), records, strict=True)
    ]
    smooth, bent = (
        read(Curves(read_history(items, "val_loss")), 300, "linear", "forecast").doubts[DOUBTS.index("bend")]
        for items in (records, dropped)
    )
    assert bent > 0.01 > 1e-4 > smooth


@pytest.mark.parametrize("kind", KINDS)
def test_terms_do_not_depend_on_the_unit_of_the_loss(kind):
    one, other = reading(kind=kind), reading(kind=kind, scale=np.log2(np.e))
    assert other.base == pytest.approx(one.base * np.log2(np.e))
    assert other.terms == pytest.approx(one.terms, rel=1e-9, abs=1e-12)
    assert other.doubts == pytest.approx(one.doubts, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_do_not_depend_on_the_unit_of_the_step_where_snapshots_are_far_apart(kind):
    every = 100 * MEMORY  # nothing is remembered from one to the next, so the memory plays no part
    options = {"every": int(every), "merge_every": 2 * int(every), "last": int(80 * every), "spans": (3, 5, 9)}
    one, other = (
        reading(int(8 * every), kind=kind, **options),
        reading(int(80 * every), kind=kind, stretch=10, **options),
    )
    assert other.terms == pytest.approx(one.terms, rel=0.02, abs=1e-4)


def test_doubts_are_never_negative():
    for shape in SHAPES:
        for kind in KINDS:
            doubts = reading(shape=shape, kind=kind).doubts
            assert len(doubts) == len(DOUBTS)
            assert np.all(doubts >= 0)
