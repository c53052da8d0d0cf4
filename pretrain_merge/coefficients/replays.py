"""Kinds that stand for a learning-rate decay: the one that its updates follow exactly, and that of a quadratic loss.

This module knows what a decay leaves of each update; which decays there are is known to `lr_schedules`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from pretrain_merge import lr_schedules
from pretrain_merge.coefficients.numbers import absorb_rounding
from pretrain_merge.coefficients.registry import Coefficients, kind
from pretrain_merge.errors import CoefficientError
from pretrain_merge.lr_schedules import ShapeSpec


@kind
def decay(n: int, *, shape: ShapeSpec = "linear", times: Sequence[float] = ()) -> Coefficients:
    """The merge that equals a replay of the recorded updates under a decaying learning rate.

    ``c_j = w_j - w_(j+1)``, where ``w_j`` is the fraction of the rate at snapshot j, 1 at the oldest and 0 after the
    newest. Exact for the updates that were recorded; a real decay would have met other gradients on its way.

    Args:
        n: Snapshots in the merge, at least 1.
        shape: The decay, as `lr_schedules.shape` takes it: a name, a callable or a list of factors.
        times: When each snapshot was taken, ascending; default: evenly spaced. The decay starts at the oldest snapshot
            and ends one mean interval after the newest: ``w_j = f((T_j - T_0) / (T_end - T_0 + mean interval))``, which
            is ``f(j / n)`` at even spacing.

    Raises:
        CoefficientError: `n` or `times` is out of range, or `shape` is not a decay.

    Source: WSM (arXiv 2507.17634), theorem 3.1.

    >>> decay(4, shape="1-square")
    (0.0625, 0.1875, 0.3125, 0.4375)
    >>> decay(3, shape=[1.0, 1.0, 0.5, 0.0])  # full rate over the first interval, half over the second
    (0.0, 0.5, 0.5)
    """
    rates = lr_schedules.factors(shape, _positions(times))
    return absorb_rounding([before - after for before, after in pairwise((1.0, *rates, 0.0))])


@kind
def qam(n: int, *, shape: ShapeSpec = "linear", times: Sequence[float] = ()) -> Coefficients:
    """The merge that lands where gradient descent under a decaying learning rate lands on a quadratic loss.

    There, a step at the fraction w of the rate is ``(1 - w) * stay + w * full step``, so a decay is a mixture of
    constant-rate runs of every length: coefficient m is the chance that m of n - 1 steps happen when step j happens
    with chance ``w_j``. Exact for snapshots one step apart; further apart, an interval counts as one large step.
    Narrower than `decay` of the same shape, which helps where a window is too long for a simple average.

    Args:
        n: Snapshots in the merge, at least 1.
        shape: The decay, as `lr_schedules.shape` takes it. Its rates ``w_j`` are those of `decay`.
        times: When each snapshot was taken, ascending; default: evenly spaced. The formula counts intervals and cannot
            weigh them, so every snapshot must lie within half a mean interval of an even grid.

    Raises:
        CoefficientError: `n` is out of range, `times` are too uneven, or `shape` is not a decay.

    Source: QAM (2026): the distribution of a sum of Bernoulli variables, built by convolution.

    >>> qam(3, shape=[1.0, 0.5, 0.5, 0.0])  # two steps, each with chance 1/2
    (0.25, 0.5, 0.25)
    """
    positions = _positions(times)
    for index, position in enumerate(positions, start=1):
        if not abs(position * n - index) < 0.5:
            raise CoefficientError(
                f"times put snapshot {index} (the oldest is 0) {position * n:.3g} mean intervals after the oldest; qam "
                f"takes snapshots within half an interval of an even grid. Use 'decay', which takes any spacing."
            )
    return absorb_rounding(_chances_of_steps(lr_schedules.factors(shape, positions)))


@lru_cache(maxsize=8)  # the same at every merge of evenly spaced snapshots, and O(n^2)
def _chances_of_steps(rates: tuple[float, ...]) -> tuple[float, ...]:
    """How likely 0, 1, 2, ... steps happen when each happens with a chance of its own."""
    import numpy as np  # not where the package is imported

    chances = np.ones(1)
    for rate in rates:
        more = np.append((1.0 - rate) * chances, 0.0)
        more[1:] += rate * chances
        chances = more
    return tuple(chances.tolist())


def _positions(taken: Sequence[float]) -> tuple[float, ...]:
    """Where in the emulated decay each snapshot but the oldest lies: j / n at even spacing."""
    n, oldest, newest = len(taken), taken[0], taken[-1]
    # One mean interval more than the snapshots span: a decay that ended on the newest would give it no weight.
    return tuple((time - oldest) / ((newest - oldest) * n / (n - 1)) for time in taken[1:])
