"""How a calibration is made: from many runs with real anneals, or from one run and a calibration to begin with.

Coefficients minimise absolute relative errors, each divided by the error expected of it: half of the anneals should
end above what is expected, and a single strange run should not move that. Expected errors come from runs that were
held out. This module knows least squares and quantiles, and nothing of how a term is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain_merge.forecast.calibration import LEAST_ERROR, Calibration
from pretrain_merge.forecast.law import DOUBTS, Reading
from pretrain_merge.forecast.noise import Floats

_LEVELS = tuple(round(0.5 + 0.05 * index, 2) for index in range(10))  # 0.5 to 0.95: some twenty runs tell no more
_FOLDS = 8
_ALARM = len(DOUBTS) - 1  # "below"; all other doubts are there at every anneal
_COMMON = 1 / 3  # of the variance of a run's errors is the same for all its anneals (measured on the suite)
# Chosen on coverage with a group of runs left out: 2 held 87% somewhere, and more widens the smallest groups only.
_STRANGER = 4.0
_LEAST_RESIDUAL = 5e-4  # of the loss: below, an error is as good as none


@dataclass(frozen=True)
class Example:
    """A reading, and how the anneal ended.

    Attributes:
        reading: What the records said.
        loss: The true annealed loss.
        run: Whose it is; runs count alike, however many anneals they have.
    """

    reading: Reading
    loss: float
    run: str


def fit(examples: Sequence[Example], *, source: str) -> Calibration:
    """A calibration from anneals of at least two runs.

    Args:
        examples: True anneals and what was read before.
        source: Where they come from, for the record.
    """
    terms = np.stack([item.reading.terms for item in examples])
    doubts = np.stack([item.reading.doubts for item in examples])
    target = np.array([item.loss / item.reading.base - 1.0 for item in examples])
    runs = np.array([item.run for item in examples])
    names = sorted(set(runs))
    weights = np.ones(len(target))
    for _ in range(2):  # the second time with the expected errors of the first
        coefficients = _least_absolute(terms, target, weights)
        held_out = _held_out_errors(terms, target, weights, runs, names)
        errors = _equal_parts(doubts, np.abs(held_out))
        expected = np.maximum(doubts @ errors, LEAST_ERROR)
        weights = expected.mean() / expected
    without = np.stack(
        [_least_absolute(terms[runs != name], target[runs != name], weights[runs != name]) for name in names]
    )
    around = without - without.mean(axis=0)
    scores = np.abs(held_out) / expected
    shares = [item.reading.share for item in examples]
    return Calibration(
        coefficients=_plain(coefficients),
        prior=tuple(map(_plain, (len(names) - 1) * around.T @ around)),  # jackknife, times the runs: of one of them
        errors=_plain(errors),
        levels=_LEVELS,
        quantiles=_plain(np.array([_quantile_by_run(scores, runs, level) for level in _LEVELS])),
        shares=(min(shares), max(shares)),
        latest=max(item.reading.end for item in examples),
        num_runs=len(names),
        source=source,
    )


def updated(prior: Calibration, examples: Sequence[Example], *, source: str) -> Calibration:
    """A calibration for one run's likes: the prior, moved by that run's own anneals as far as they tell.

    The coefficients of a run are taken as drawn around the prior's with its covariance, and its anneals as off by their
    expected errors, partly alike; what is returned is the mean of the coefficients given the anneals.

    Args:
        prior: A calibration of other runs.
        examples: Anneals of one run, at least one.
        source: Where they come from.
    """
    terms = np.stack([item.reading.terms for item in examples])
    target = np.array([item.loss / item.reading.base - 1.0 for item in examples])
    expected = np.array([prior.expected_error(item.reading) for item in examples])
    spread = np.array(prior.prior)
    before = np.array(prior.coefficients)
    # Laplace: the variance is twice the squared mean error
    errors = 2.0 * ((1.0 - _COMMON) * np.diag(expected**2) + _COMMON * np.outer(expected, expected))
    gain = spread @ terms.T @ np.linalg.inv(terms @ spread @ terms.T + errors)
    after = before + gain @ (target - terms @ before)
    known = (np.eye(len(before)) - gain @ terms) @ spread
    # one run more among those that say how wide an interval must be
    score = float(np.mean(np.abs(target - terms @ before) / expected))
    wider = (prior.num_runs + max(1.0, score)) / (prior.num_runs + 1)
    shares = [item.reading.share for item in examples]
    return replace(
        prior,
        coefficients=_plain(after),
        prior=tuple(map(_plain, known)),
        quantiles=tuple(wider * value for value in prior.quantiles),
        shares=(min(prior.shares[0], *shares), max(prior.shares[1], *shares)),
        latest=max(prior.latest, *(item.reading.end for item in examples)),
        num_runs=prior.num_runs + 1,
        source=source,
    )


def _least_absolute(terms: Floats, target: Floats, weights: Floats) -> Floats:
    """Weighted least absolute deviations, by least squares that are weighted again and again."""
    current = weights
    coefficients = np.zeros(terms.shape[1])
    for _ in range(40):
        weighted = terms * current[:, None]
        coefficients = np.linalg.solve(weighted.T @ terms + 1e-9 * np.eye(terms.shape[1]), weighted.T @ target)
        current = weights / np.maximum(np.abs(target - terms @ coefficients), _LEAST_RESIDUAL)
    return coefficients


def _held_out_errors(
    terms: Floats,
    target: Floats,
    weights: Floats,
    runs: np.ndarray[tuple[int], np.dtype[np.str_]],
    names: Sequence[str],
) -> Floats:
    """What is left of each run's anneals by coefficients that were fitted without it."""
    left = np.zeros(len(target))
    for fold in range(min(_FOLDS, len(names))):
        held = np.isin(runs, names[fold::_FOLDS])
        left[held] = target[held] - terms[held] @ _least_absolute(terms[~held], target[~held], weights[~held])
    return left


def _equal_parts(doubts: Floats, errors: Floats) -> Floats:
    """What an error grows by with each doubt, if each brings the same part of the mean error.

    Fitting them (the likelihood of Laplace errors, none of them negative) was tried: it learns which doubt its own runs
    had, and with an optimizer, a text or a length left out its 90% intervals held 83 to 98%, these 91 to 97%.

    The alarm alone is told by the error that is left where it sounds.
    """
    always = doubts[:, :_ALARM]
    parts = errors.mean() / np.maximum(always.mean(axis=0), 1e-12) / _ALARM
    sounds = doubts[:, _ALARM] > 0
    left = np.sum(errors[sounds] - always[sounds] @ parts) / max(1e-12, doubts[sounds, _ALARM].sum())
    return np.append(parts, max(0.0, left))


def _quantile_by_run(scores: Floats, runs: np.ndarray[tuple[int], np.dtype[np.str_]], level: float) -> float:
    """The score that a share of the anneals stays below, each run counting the same, and so does the run to come.

    Of that little is known: it counts as one that errs `_STRANGER` times as much as these. Counting it as worse than
    all (conformal prediction, Vovk et al. 2005, with runs for examples) made intervals of few runs those of their worst
    anneal. Where so few runs cannot tell the level, the largest score stands for it.
    """
    _, run_of, counts = np.unique(runs, return_inverse=True, return_counts=True)
    weights = 1 / counts[run_of]
    all_scores = np.concatenate([scores, _STRANGER * scores])
    all_weights = np.concatenate([weights, weights / len(counts)])
    order = np.argsort(all_scores)
    reached = np.cumsum(all_weights[order]) / (len(counts) + 1)
    return float(all_scores[order][min(int(np.searchsorted(reached, level)), len(order) - 1)])


def _plain(values: Floats) -> tuple[float, ...]:
    """Six digits: no fit knows more, and a library of linear algebra that rounds otherwise gives the same file."""
    return tuple(float(f"{value:.6g}") for value in values)
