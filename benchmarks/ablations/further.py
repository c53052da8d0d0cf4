"""What going beyond a mean gains: an `extrapolated` view, its step chosen on one half of the text, judged on the other.

Each is compared with the plain mean that its step 0 is, with ten snapshots and with what `auto` chooses, on the same
half. Knows results; knows neither figures nor words.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.ablations import rules
from benchmarks.ablations.gains import Spread, nested, unit
from benchmarks.ablations.merges import FURTHER
from benchmarks.ablations.records import Result, Row
from benchmarks.ablations.setups import BETWEEN, STAGES

_PLAIN = {"ten snapshots": "every: 1%, N = 10", "auto, window 23": "auto, window 23"}
CHOSEN = "chosen step"


class Gain(NamedTuple):
    """What a way of merging loses or gains at one step of one run.

    Attributes:
        way: Its name.
        cell: What was trained.
        units: The stage.
        percent: Of the loss, against the plain mean over a tenth that step 0 is; below 0 is better.
    """

    way: str
    cell: str
    units: int
    percent: float


def gains(results: Sequence[Result]) -> list[Gain]:
    """Of every run that measured it, at every stage, mean of both ways to split the text."""
    return [gain for result in results for units in sorted((*STAGES, *BETWEEN)) for gain in _at(result, units)]


def table(found: Sequence[Gain]) -> list[tuple[str, Spread, float, int]]:
    """Way, mean over runs and stages, the worst, and at how many of them it is below step 0; the best first."""
    rows = []
    for way in dict.fromkeys(gain.way for gain in found):
        percents = [gain.percent for gain in found if gain.way == way]
        rows.append((way, Spread.of(percents), max(percents), sum(percent < 0.0 for percent in percents)))
    return sorted(rows, key=lambda row: row[1].mean)


def _at(result: Result, units: int) -> Iterator[Gain]:
    step = max((step for step in nested(result) if step <= units * unit(result)), default=0)
    lines = {row.kind: row for row in result.constant.get(step, ()) if row.kind in FURTHER}
    if len(lines) < len(FURTHER):  # measured before there were any
        return
    halves = (lambda row: row.choosing), (lambda row: row.judging)
    at_0 = lines[min(FURTHER, key=FURTHER.__getitem__)]
    plain = nested(result)[step]

    def percent(chosen: Sequence[Row]) -> float:
        """Of what was chosen on the first half and on the second, each judged on the other."""
        judged = zip(chosen, reversed(halves), strict=True)
        return 100.0 * (statistics.fmean(judge(row) / judge(at_0) for row, judge in judged) - 1.0)

    ways: Mapping[str, Sequence[Row]] = {
        **{kind: [row, row] for kind, row in lines.items() if row is not at_0},
        CHOSEN: [min(lines.values(), key=look) for look in halves],
        **{
            name: [rules.CHOICES[rule](plain, [look(row) for row in plain], step) for look in halves]
            for name, rule in _PLAIN.items()
        },
    }
    for way, chosen in ways.items():
        yield Gain(way, str(result.setup["cell"]), units, percent(chosen))
