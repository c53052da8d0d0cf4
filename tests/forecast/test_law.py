"""The terms of the law mean what they say, and do not depend on units."""

import numpy as np
import pytest
from forecast.synthetic import MEMORY, left, river, run

from pretrain_merge.config import FORECAST_KINDS, FORECAST_SHAPES
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.curves import Curves
from pretrain_merge.forecast.history import read_history
from pretrain_merge.forecast.law import DOUBTS, KINDS, PROGRESS, TERMS, read
from pretrain_merge.lr_schedules import SHAPES


def reading(steps=300, shape="linear", kind="nowcast", **options):
    return read(Curves(read_history(run(**({"last": 4000} | options)), "val_loss")), steps, shape, kind)


def term(name, **options):
    return reading(**options).terms[TERMS.index(name)]


def test_the_configuration_allows_what_the_law_knows():
    assert set(FORECAST_SHAPES) == set(PROGRESS)
    assert set(FORECAST_KINDS) == set(KINDS)


@pytest.mark.parametrize("shape", PROGRESS)
def test_progress_is_the_integral_of_the_learning_rate_factor(shape):
    middles = (np.arange(100_000) + 0.5) / 100_000
    assert PROGRESS[shape] == pytest.approx(np.mean([SHAPES[shape](t) for t in middles]), rel=1e-4)


def test_the_gap_is_the_raw_trend_at_the_middle_of_the_mean_above_it():
    merged = river(4000 - 150) + 0.1 * left(np.arange(301))
    # a twentieth: the noise is taken a little too small, since all means keep some of it
    assert term("c0") == pytest.approx((river(4000 - 150) + 0.1 - merged) / merged, rel=0.05)


def test_a_linear_nowcast_is_read_where_the_mean_lies_and_nothing_is_extrapolated():
    assert term("kappa") == pytest.approx(0.0, abs=1e-12)
    assert term("kappa", shape="cosine") == pytest.approx(0.0, abs=1e-12)
    assert term("kappa", shape="1-sqrt") > 0  # it makes less progress, and ends higher


def test_a_forecast_follows_the_merged_curve_to_where_the_anneal_gets():
    moved = np.log((4000 + 150) / (4000 - 150))
    middle = 4000 - 150
    slope = (river(3000 - 150) - river(middle)) / np.log(middle / (3000 - 150))
    merged = river(middle) + 0.1 * left(np.arange(301))
    assert term("kappa", kind="forecast") == pytest.approx(-slope * moved / merged, rel=0.02)


@pytest.mark.parametrize("shape", PROGRESS)
def test_each_shape_has_its_own_term_beside_the_linear_one(shape):
    on = {"cosine": "c_cos", "1-sqrt": "c_sqrt"}
    for name in on.values():
        assert term(name, shape=shape) == (pytest.approx(term("c0")) if on.get(shape) == name else 0.0)


def test_a_long_anneal_gains_in_proportion_to_its_share_of_training():
    assert term("c1") == pytest.approx(term("c0") * 300 / 4000)
    assert term("c1", kind="forecast") == pytest.approx(term("c0") * 300 / 4300)


def test_what_the_halves_keep_is_large_where_the_noise_is_remembered():
    close = reading(40, every=5, merge_every=20, spans=(3, 5, 9))
    oracle = 0.1 * (left(np.arange(21)) - left(np.arange(41)))
    assert close.terms[TERMS.index("cJ")] * close.base == pytest.approx(oracle, rel=0.15)
    assert term("cJ") < 0.5 * close.terms[TERMS.index("cJ")]


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
    for shape in PROGRESS:
        for kind in KINDS:
            doubts = reading(shape=shape, kind=kind).doubts
            assert len(doubts) == len(DOUBTS)
            assert np.all(doubts >= 0)


def test_without_a_mean_over_half_the_length_nothing_is_said_and_the_remedy_is_named():
    with pytest.raises(ForecastError, match=r"both halves of 350 steps.*about 175 steps.*add a view over half"):
        reading(350, spans=(8, 16), last=400)
