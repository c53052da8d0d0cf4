"""How much each snapshot counts in a merge: coefficients, oldest to newest, in float64, summing to 1.

A merge is a weighted sum of snapshots, ``sum_j c_j theta_j``. This module computes the ``c_j`` and nothing else. It
knows no tensors and no storage, and of the snapshots only how many there are and when they were taken.

The same numbers can be read as a learning-rate decay. Snapshot j is the oldest one plus the updates ``g_1, ..., g_j``
of the intervals between; so in the merge, update ``g_i`` is left with the factor ``w_i = c_i + c_(i+1) + ...``, as if
its learning rate had been cut to that fraction (WSM, arXiv 2507.17634, theorem 3.1). `decay` goes from the rates to the
coefficients, `decay_curve` back:

>>> decay_curve(sma(4))  # averaging four snapshots is a linear decay
(0.75, 0.5, 0.25)
>>> [round(c, 3) for c in decay(5, shape="1-sqrt")]  # a decay that falls fast at first leans on the oldest
[0.447, 0.185, 0.142, 0.12, 0.106]

A new kind of coefficients is one function under `@kind`; `compute` and the configuration then know its name.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, wraps
from itertools import pairwise
from numbers import Integral, Real
from typing import TypeAlias, TypeVar

from pretrain_merge import lr_schedules
from pretrain_merge.errors import CoefficientError, nearest
from pretrain_merge.lr_schedules import ShapeSpec

Coefficients: TypeAlias = tuple[float, ...]
_KindT = TypeVar("_KindT", bound=Callable[..., Coefficients])

KINDS: dict[str, Callable[..., Coefficients]] = {}

SUM_TOLERANCE = 1e-12
_LARGEST = 1e300  # no sum and no difference of two numbers below this overflows


def kind(function: _KindT) -> _KindT:
    """Registers a kind of coefficients under its function's name, behind a gate that all kinds share.

    The function takes the number of snapshots first and its parameters by keyword. The gate lets it see a positive
    integer only; a parameter called ``times`` is a tuple of ascending numbers, one for each snapshot (0, 1, 2, ...
    where none were given); and what it returns must be as many finite numbers, which sum to 1.
    """
    name, takes_times = function.__name__, "times" in inspect.signature(function).parameters

    @wraps(function)
    def gated(n: int, **parameters: object) -> Coefficients:
        number = _count(n)
        if takes_times:
            parameters["times"] = _times(parameters.get("times"), number)
        return _summing_to_one(f"the coefficients of kind {name!r}", function(number, **parameters), number)

    KINDS[name] = gated
    return gated  # type: ignore[return-value]


def compute(kind: str, n: int, /, *, times: Sequence[float] | None = None, **parameters: object) -> Coefficients:
    """Computes the coefficients of a kind given by name, as a configuration gives it.

    Args:
        kind: A name in `KINDS`.
        n: Snapshots in the merge, at least 1.
        times: When each snapshot was taken, ascending, in any unit (steps, samples, tokens). Only the kinds that depend
            on it see it.
        parameters: The kind's own parameters.

    Returns:
        `n` coefficients, oldest to newest, that sum to 1 within `SUM_TOLERANCE`.

    Raises:
        CoefficientError: The kind or a parameter is unknown, missing or out of range.

    >>> compute("decay", 3, shape=[1.0, 0.5, 0.25, 0.0])
    (0.5, 0.25, 0.25)
    """
    if kind not in KINDS:
        raise _unknown("kind", kind, KINDS)
    accepted = _parameters(kind)
    takes_times = accepted.pop("times", None) is not None
    for name in parameters:
        if name not in accepted:
            raise _unknown(f"parameter of {kind!r}", name, accepted)
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in parameters:
            raise CoefficientError(
                f"kind {kind!r} was given {sorted(parameters)} and cannot do without {name!r}. Set {name!r}."
            )
    if takes_times:
        parameters["times"] = times
    return KINDS[kind](n, **parameters)


@kind
def sma(n: int) -> Coefficients:
    """Simple moving average: every snapshot counts the same.

    Args:
        n: Snapshots in the merge, at least 1.

    Raises:
        CoefficientError: `n` is not a positive integer.

    Source: PMA (arXiv 2505.12082). Emulates a linear decay to zero (WSM, arXiv 2507.17634, theorem 3.1).

    >>> sma(4)
    (0.25, 0.25, 0.25, 0.25)
    """
    return (1 / n,) * n


@kind
def wma(n: int) -> Coefficients:
    """Weighted moving average: snapshot i of n counts i times as much as the oldest.

    Args:
        n: Snapshots in the merge, at least 1.

    Raises:
        CoefficientError: `n` is not a positive integer.

    Source: PMA (arXiv 2505.12082).

    >>> wma(4)
    (0.1, 0.2, 0.3, 0.4)
    """
    total = n * (n + 1) // 2
    return tuple(i / total for i in range(1, n + 1))


@kind
def ema(
    n: int, *, alpha: float | None = None, half_life: float | None = None, times: Sequence[float] = ()
) -> Coefficients:
    """Exponential moving average: the recursion ``M <- alpha * M_i + (1 - alpha) * M``, started at the oldest snapshot.

    The oldest keeps what no newer one took, ``(1 - alpha)^(n-1)``. The closed form that is printed beside the recursion
    in the paper leaves this term out, and so does not sum to 1.

    Args:
        n: Snapshots in the merge, at least 1.
        alpha: What each newer snapshot takes, in (0, 1], however far apart they are. Give this or `half_life`.
        half_life: The time after which a snapshot's influence has halved, above 0, in the unit of `times`.
        times: When each snapshot was taken, ascending; default: 0, 1, 2, ..., so that `half_life` counts snapshots.

    Raises:
        CoefficientError: An argument is out of range, or not exactly one of `alpha` and `half_life` is given.

    Source: PMA (arXiv 2505.12082).

    >>> ema(3, alpha=0.5)
    (0.25, 0.25, 0.5)
    >>> [round(c, 9) for c in ema(3, half_life=1000, times=[5000, 6000, 8000])]
    [0.125, 0.125, 0.75]
    """
    coefficients, left = [], 1.0  # from the newest, which takes its share of all; the oldest keeps what is left
    for share in reversed(_ema_shares(times, alpha, half_life)):
        coefficients.append(left * share)
        left *= 1.0 - share
    return _absorb_rounding([left, *reversed(coefficients)])


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
    return _absorb_rounding([before - after for before, after in pairwise((1.0, *rates, 0.0))])


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
    return _absorb_rounding(_chances_of_steps(lr_schedules.factors(shape, positions)))


@kind
def custom(n: int, *, weights: Sequence[float]) -> Coefficients:
    """Takes the coefficients as they are given. Negative ones extrapolate.

    Args:
        n: Snapshots in the merge, at least 1.
        weights: Exactly `n` finite numbers, oldest to newest, that sum to 1 within `SUM_TOLERANCE`.

    Raises:
        CoefficientError: There are not `n` numbers, one is not finite, or the sum is not 1; the message then holds the
            normalised list.

    >>> custom(3, weights=[-0.5, 0.5, 1.0])
    (-0.5, 0.5, 1.0)
    """
    return _summing_to_one("weights", weights, _count(n))


def decay_curve(coefficients: Sequence[float]) -> tuple[float, ...]:
    """The learning-rate decay that a merge emulates: the factor that is left on each interval's update.

    Args:
        coefficients: Oldest to newest, summing to 1.

    Returns:
        ``w_i = c_i + c_(i+1) + ...`` for i from 1 to n - 1, oldest interval first. Where none is negative,
        ``decay(n, shape=[1, *w, 0])`` is the way back.

    Raises:
        CoefficientError: `coefficients` are not finite numbers that sum to 1.

    Source: WSM (arXiv 2507.17634), theorem 3.1.

    >>> decay_curve((0.25, 0.25, 0.5))
    (0.75, 0.5)
    """
    checked = _summing_to_one("coefficients", coefficients)
    return tuple(math.fsum(checked[i:]) for i in range(1, len(checked)))


def n_eff(coefficients: Sequence[float]) -> float:
    """How many snapshots of equal weight would average independent noise down as far.

    Args:
        coefficients: Oldest to newest, summing to 1.

    Returns:
        ``1 / sum_j c_j^2``: n for `sma`, 1 for a single snapshot, below 1 where negative coefficients amplify noise.

    Raises:
        CoefficientError: `coefficients` are not finite numbers that sum to 1.

    >>> n_eff((0.5, 0.5, 0.0))
    2.0
    """
    return 1.0 / math.fsum(c * c for c in _summing_to_one("coefficients", coefficients))


def mean_age(coefficients: Sequence[float], times: Sequence[float] | None = None) -> float:
    """How far a merge lags behind the newest snapshot, on average.

    Args:
        coefficients: Oldest to newest, summing to 1.
        times: When each snapshot was taken, ascending; default: 0, 1, 2, ...

    Returns:
        ``sum_j c_j (T_end - T_j)`` in the unit of `times`, by default in snapshots.

    Raises:
        CoefficientError: `coefficients` are not finite numbers that sum to 1, or `times` do not fit them.

    >>> mean_age(sma(5))
    2.0
    """
    checked = _summing_to_one("coefficients", coefficients)
    taken = _times(times, len(checked))
    return math.fsum(c * (taken[-1] - time) for c, time in zip(checked, taken, strict=True))


def _ema_shares(taken: Sequence[float], alpha: float | None, half_life: float | None) -> list[float]:
    """What each snapshot but the oldest takes when it is mixed in."""
    if (alpha is None) == (half_life is None):
        raise CoefficientError(
            f"ema was given alpha={alpha!r} and half_life={half_life!r}; it takes exactly one of the two. "
            f"Set alpha=0.2, or a half_life in the unit of the times."
        )
    if alpha is not None:
        if not 0.0 < _number("alpha", alpha) <= 1.0:
            raise CoefficientError(f"alpha is {alpha!r}; it must lie in (0, 1]. PMA uses 0.1 and 0.2.")
        return [float(alpha)] * (len(taken) - 1)
    half = _number("half_life", half_life)
    if not half > 0.0:
        raise CoefficientError(f"half_life is {half!r}; it must be above 0. Give it in the unit of the times.")
    # 1 - 0.5^x, without the cancellation that this form suffers where x is small
    return [-math.expm1(-math.log(2.0) * ((after - before) / half)) for before, after in pairwise(taken)]


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


def _absorb_rounding(values: Iterable[float]) -> Coefficients:
    """Gives what rounding left of 1 to the largest coefficient, where it is relatively smallest."""
    coefficients = list(values)
    coefficients[coefficients.index(max(coefficients))] += 1.0 - math.fsum(coefficients)
    return tuple(coefficients)


def _summing_to_one(name: str, values: Sequence[float], n: int | None = None) -> Coefficients:
    checked = _numbers(name, values, n)
    total = math.fsum(checked)
    if not abs(total - 1.0) <= SUM_TOLERANCE:
        way_out = f"Normalised: {[value / total for value in checked]}." if total > 0.0 else "They need a positive sum."
        raise CoefficientError(f"{name} {list(checked)} sum to {total!r}; the sum must be 1. {way_out}")
    return checked


def _times(times: object, n: int) -> tuple[float, ...]:
    taken = _numbers("times", range(n) if times is None else times, n)
    for before, after in pairwise(taken):
        if not before < after:
            raise CoefficientError(
                f"times have {after!r} after {before!r}; each must be later than the one before it. "
                f"Pass them oldest to newest, one per snapshot."
            )
    return taken


def _numbers(name: str, values: object, n: int | None) -> tuple[float, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise CoefficientError(f"{name} is {values!r}; allowed is a list of numbers. Pass one number per snapshot.")
    numbers = tuple(_number(f"{name}[{index}]", value) for index, value in enumerate(values))
    if len(numbers) != (n or max(1, len(numbers))):
        raise CoefficientError(
            f"{name} has length {len(numbers)} and must have {n or 'at least 1'}: one number per snapshot, oldest to "
            f"newest. Pass as many as there are snapshots in the merge."
        )
    return numbers


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not value <= _LARGEST or value < -_LARGEST:
        raise CoefficientError(f"{name} is {value!r}; allowed are finite numbers. Replace it by one.")
    return float(value)


def _count(n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise CoefficientError(f"n is {n!r}; allowed are integers from 1. Pass the number of snapshots in the merge.")
    return int(n)


def _parameters(kind: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(KINDS[kind]).parameters.values()
    return {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _unknown(what: str, given: str, allowed: Iterable[str]) -> CoefficientError:
    names = list(allowed)
    meant = nearest(given, names)
    way_out = f"Did you mean {meant!r}?" if meant else "Use one of those."
    if what == "kind" and given in lr_schedules.SHAPES:
        way_out = f"{given!r} is a shape: use kind 'decay' with shape={given!r}."
    return CoefficientError(f"unknown {what}: {given!r}; known: {', '.join(names) or 'none'}. {way_out}")
