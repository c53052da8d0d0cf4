"""What the coefficients are for: where a merge of snapshots lands, against the run that it stands for."""

import itertools

import numpy as np
import pytest
from coefficients.strategies import counts, law, merges, times_of
from harness import oracles
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.coefficients import compute, decay, decay_curve, ema, qam
from pretrain_merge.lr_schedules import SHAPES


def walk(rng, n, size=7):
    """Snapshots of a run, and the updates that led from each to the next."""
    updates = rng.normal(size=(n - 1, size))
    start = rng.normal(size=size)
    return np.vstack([start, start + np.cumsum(updates, axis=0)]), updates


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "times", [range(12), [0, 1, 2, 30, 31, 32, 33, 34, 100, 101, 102, 103]], ids=["even", "uneven"]
)
def test_a_decay_merge_is_where_the_recorded_updates_lead_when_each_is_scaled(name, times):
    snapshots, updates = walk(np.random.default_rng(0), len(times))
    merged = np.array(decay(len(times), shape=name, times=times)) @ snapshots
    rates = oracles.decay_rates(oracles.SHAPES[name], times)
    np.testing.assert_allclose(merged, oracles.replayed(snapshots[0], updates, rates), rtol=0, atol=1e-13)


@law
@given(merge=merges(), seed=st.integers(0, 2**32 - 1))
def test_any_merge_is_where_the_updates_lead_when_scaled_by_its_decay_curve(merge, seed):
    name, n, times, parameters = merge
    snapshots, updates = walk(np.random.default_rng(seed), n)
    merge_coefficients = compute(name, n, times=times, **parameters)
    expected = oracles.replayed(snapshots[0], updates, decay_curve(merge_coefficients))
    scale = 1 + np.abs(merge_coefficients).sum() * np.abs(snapshots).max()
    np.testing.assert_allclose(np.array(merge_coefficients) @ snapshots, expected, rtol=0, atol=1e-13 * n * scale)


def quadratic(rng, size=5):
    """A Hessian whose curvatures times the learning rate .7 reach from slow to oscillating, and its minimum."""
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return basis @ np.diag(np.linspace(0.05, 2.5, size)) @ basis.T, rng.normal(size=size)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_a_qam_merge_is_where_decayed_gradient_descent_on_a_quadratic_ends(name, n):
    rng = np.random.default_rng(n)
    start, (hessian, minimum) = 10 * rng.normal(size=5), quadratic(rng)
    constant = oracles.gradient_descent(start, hessian, minimum, [0.7] * (n - 1))
    annealed = oracles.gradient_descent(
        start, hessian, minimum, 0.7 * oracles.decay_rates(oracles.SHAPES[name], range(n))
    )
    np.testing.assert_allclose(np.array(qam(n, shape=name)) @ constant, annealed[-1], rtol=0, atol=1e-12)
    if n > 2:  # with one update the two kinds agree
        assert np.abs(np.array(decay(n, shape=name)) @ constant - annealed[-1]).max() > 1e-3


def test_a_qam_merge_of_stochastic_gradient_descent_is_right_in_expectation_only():
    """Two minibatch losses, every one of the 2^6 orders in which six steps can meet them."""
    rng = np.random.default_rng(7)
    n, start, batches = 7, 10 * rng.normal(size=5), [quadratic(rng), quadratic(rng)]
    rates = oracles.decay_rates(oracles.SHAPES["cosine"], range(n))

    def iterates(order, learning_rates):
        theta = [start]
        for batch, learning_rate in zip(order, learning_rates, strict=True):
            theta.append(oracles.gradient_descent(theta[-1], *batches[batch], [learning_rate])[-1])
        return np.array(theta)

    orders = list(itertools.product([0, 1], repeat=n - 1))
    merged = np.array([np.array(qam(n, shape="cosine")) @ iterates(order, [0.4] * (n - 1)) for order in orders])
    annealed = np.array([iterates(order, 0.4 * rates)[-1] for order in orders])
    np.testing.assert_allclose(merged.mean(axis=0), annealed.mean(axis=0), rtol=0, atol=1e-12)
    assert np.abs(merged - annealed).max() > 1e-2


@law
@given(data=st.data(), n=counts, half_life=st.floats(1.0, 1e5))
def test_what_is_one_half_life_old_and_older_holds_half_the_mass(data, n, half_life):
    times = data.draw(times_of(n))
    held = np.cumsum(ema(n, half_life=half_life, times=times))
    np.testing.assert_allclose(held, 0.5 ** ((times[-1] - np.array(times)) / half_life), rtol=0, atol=1e-13)
