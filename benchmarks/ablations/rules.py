"""Rules that choose a span, against the best of all spans: how much of the loss does a rule leave on the table?

A rule may look at one half of the held-out text and is judged on the other, and then the other way around. So is the
best of all spans: it is the best on the half that judges, which no rule can know.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ablations.gains import find, nested, raw, unit
from benchmarks.ablations.merges import LIMIT, WINDOW, Plan
from benchmarks.ablations.records import Result, Row
from benchmarks.ablations.setups import BETWEEN, INTERVALS, STAGES
from pretrain_merge.config import LONGEST_SPAN, SPAN, USUAL_SPAN
from pretrain_merge.merging.best_span import best_span, followed
from pretrain_merge.merging.best_span import nested as nested_numbers

_MOVES = 12  # four lead from the first share to the largest, and eight to the smallest
Choice = Callable[[Sequence[Row], Sequence[float], int], Row]


class Regret(NamedTuple):
    """What a rule lost at one step of one run.

    Attributes:
        rule: Its name.
        cell: What was trained.
        units: The stage.
        percent: Of the loss, against the best of all spans.
    """

    rule: str
    cell: str
    units: int
    percent: float


def regrets(results: Sequence[Result], choices: Mapping[str, Choice]) -> list[Regret]:
    """Every rule at every stage of every run, mean of both ways to split the text."""
    return [regret for result in results for units in (*STAGES, *BETWEEN) for regret in _at(result, units, choices)]


def table(found: Sequence[Regret]) -> list[dict[str, Any]]:
    """Mean and worst of each rule, the best first."""
    rows = []
    for rule in dict.fromkeys(regret.rule for regret in found):
        mine = [regret for regret in found if regret.rule == rule]
        worst = max(mine, key=lambda regret: regret.percent)
        rows.append(
            {
                "rule": rule,
                "mean": float(np.mean([regret.percent for regret in mine])),
                "max": worst.percent,
                "worst_at": f"{worst.cell}, {2 * worst.units}% of the run",
                "n": len(mine),
            }
        )
    return sorted(rows, key=lambda row: row["mean"])


def nearest_share(share: float) -> Choice:
    """The span that is nearest to a share of the steps so far."""
    return lambda rows, losses, step: min(rows, key=lambda row: abs(math.log(row.span / (share * step))))


def newest(number: int) -> Choice:
    """The mean of so many of the newest snapshots, 1% apart."""
    return lambda rows, losses, step: next(row for row in rows if row.asked == number)


def parabola(*numbers: int) -> Choice:
    """What the view `auto` chooses from means of so many snapshots; of all, where no number is given."""

    def choose(rows: Sequence[Row], losses: Sequence[float], step: int) -> Row:
        read = {row.span: loss for row, loss in zip(rows, losses, strict=True) if not numbers or row.asked in numbers}
        best = best_span(read, usual=USUAL_SPAN * step)
        assert best is not None
        # judged on the measured mean that is nearest: the text was read for no other
        return min(rows, key=lambda row: abs(math.log(row.span / best.span)))

    return choose


def following(rows: Sequence[Row], losses: Sequence[float], step: int) -> Row:
    """Where the limit of a view settles that merge points move, as if all of them were this one."""
    known = [(row, loss) for row, loss in zip(rows, losses, strict=True) if row.asked <= WINDOW]

    def nearest(share: float) -> tuple[Row, float]:
        return min(known, key=lambda item: abs(math.log(item[0].span / (share * step))))

    share, longer = SPAN, nearest(SPAN)
    for _ in range(_MOVES):
        longer, half = nearest(share), nearest(share / 2.0)
        used = longer[0].span / step
        share = followed(share, used, is_better_longer=longer[1] <= half[1], at_most=LONGEST_SPAN)
    return longer[0]


def seen(rows: Sequence[Row], losses: Sequence[float], step: int) -> Row:
    """The span with the smallest loss on all the text, the half that judges among it."""
    return min(rows, key=lambda row: row.loss)


CHOICES: Mapping[str, Choice] = {
    "parabola through nested means of 2 to 90": parabola(),
    "auto, window 10": parabola(*nested_numbers(WINDOW, "last")),
    "auto, window 23": parabola(3, 7, 12, 23),
    "auto, window 42": parabola(7, 12, 23, 42),  # its whole, a half, a quarter, an eighth
    "the best of the nested means, seen on both halves": seen,  # no rule: what the comparison itself costs
    "every: 1%, N = 10, a limit that follows": following,  # the default
    "every: 1%, N = 10, at most 6%": newest(7),  # where it begins
    "every: 1%, N = 10": newest(10),
    "every: 1%, N = 12": newest(12),
    "span 10% of the steps so far": nearest_share(0.1),
}


def best_share(result: Result, units: int) -> float:
    """The best span as a share of the steps so far: the vertex of a parabola in its logarithm through three spans."""
    step, rows = _nested_at(result, units)
    losses = np.array([row.loss for row in rows])
    middle = int(np.clip(np.argmin(losses), 1, len(rows) - 2))
    x = np.log([row.span / step for row in rows])[middle - 1 : middle + 2]
    a, b, _ = np.polyfit(x, losses[middle - 1 : middle + 2], 2)
    return float(np.exp(np.clip(-b / (2 * a), x[0], x[-1])))


def break_even(result: Result, units: int) -> float:
    """The share of the steps so far over which a plain mean is no better than raw; NaN: longer than measured."""
    step, rows = _nested_at(result, units)
    at_raw = raw(result.constant[step]).loss
    for before, after in pairwise(rows):
        if before.loss < at_raw <= after.loss:
            part = (at_raw - before.loss) / (after.loss - before.loss)
            return math.exp((1 - part) * math.log(before.span / step) + part * math.log(after.span / step))
    return math.nan


def _at(result: Result, units: int, choices: Mapping[str, Choice]) -> Iterator[Regret]:
    step, rows = _nested_at(result, units)
    fixed = result.constant[units * unit(result)]
    cell = str(result.setup["cell"])
    halves = (lambda row: row.choosing), (lambda row: row.judging)

    # up to 1% of the steps lies between the two, which is worth a twentieth of a percent: each has its own best
    own_best = [*rows, *(row for row in fixed if row.kind == "sma")]

    def regret(rule: str, chosen: Sequence[Row], among: Sequence[Row] = rows) -> Regret:
        """Of what was chosen on the first half and on the second."""
        ratios = [
            judge(row) / min(judge(other) for other in among)
            for row, judge in zip(chosen, reversed(halves), strict=True)
        ]
        return Regret(rule, cell, units, 100.0 * (float(np.mean(ratios)) - 1.0))

    for rule, choice in choices.items():
        yield regret(rule, [choice(rows, [look(row) for row in rows], step) for look in halves])
    yield regret("raw", [raw(result.constant[step])] * 2)
    yield regret("EMA, half-life 5% of the steps", [find(result.constant[step], "ema 5%", 0, 90)] * 2)
    for part, tokens in INTERVALS.items():
        every = unit(result) // part
        yield regret(f"N = 10, V = {tokens}", [find(fixed, "sma", every, WINDOW)] * 2, own_best)
        limited = Plan(unit(result)).limited(units * unit(result), every)
        yield regret(f"N = 10, V = {tokens}, at most {LIMIT:.0%}", [find(fixed, "sma", every, limited)] * 2, own_best)


def _nested_at(result: Result, units: int) -> tuple[int, list[Row]]:
    """The last step up to a stage at which nested spans were measured."""
    found = nested(result)
    step = max(step for step in found if step <= units * unit(result))
    return step, found[step]
