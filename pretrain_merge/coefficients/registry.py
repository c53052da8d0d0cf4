"""Kinds of coefficients by name, behind one gate: what a configuration asks for, and what a kind may return.

This module knows signatures. It knows no formula.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TypeAlias, TypeVar

from pretrain_merge import lr_schedules
from pretrain_merge.coefficients.numbers import ascending, count, summing_to_one
from pretrain_merge.errors import CoefficientError, nearest

Coefficients: TypeAlias = tuple[float, ...]
_KindT = TypeVar("_KindT", bound=Callable[..., Coefficients])

KINDS: dict[str, Callable[..., Coefficients]] = {}


def kind(function: _KindT) -> _KindT:
    """Registers a kind of coefficients under its function's name, behind a gate that all kinds share.

    The function takes the number of snapshots first and its parameters by keyword. The gate lets it see a positive
    integer only; a parameter called ``times`` is a tuple of ascending numbers, one for each snapshot (0, 1, 2, ...
    where none were given); and what it returns must be as many finite numbers, which sum to 1.
    """
    name, takes_times = function.__name__, "times" in inspect.signature(function).parameters

    @wraps(function)
    def gated(n: int, **parameters: object) -> Coefficients:
        number = count(n)
        if takes_times:
            parameters["times"] = ascending(parameters.get("times"), number)
        return summing_to_one(f"the coefficients of kind {name!r}", function(number, **parameters), number)

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
