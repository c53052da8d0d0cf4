"""What a merge gains over the raw model of its step, run by run. Reads results; knows neither figures nor words."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.ablations.records import Result, Row
from benchmarks.ablations.setups import UNITS


class Spread(NamedTuple):
    """A mean over runs.

    Attributes:
        mean: Of all runs.
        error: Standard error of the mean; NaN of a single run.
        num: Runs.
    """

    mean: float
    error: float
    num: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = list(values)
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        return cls(statistics.fmean(found), error, len(found))


def unit(result: Result) -> int:
    """Steps that stand for 32 billion tokens of the paper."""
    return int(result.setup["num_steps"]) // UNITS


def of_cells(results: Sequence[Result], *cells: str) -> list[Result]:
    """The runs of some cells."""
    return [result for result in results if result.setup["cell"] in cells]


def gain(result: Result, units: int, kind: str, part: int, asked: int = 10, *, in_decay: bool = False) -> float:
    """Loss of a merge against that of the raw model, in percent; below 0 is better.

    Args:
        result: Of one run.
        units: The stage.
        kind: Of the coefficients, or "block".
        part: The interval, as a part of a unit.
        asked: Snapshots of the view.
        in_decay: Of the branch whose rate falls.
    """
    step, every = units * unit(result), unit(result) // part
    rows = (result.decay if in_decay else result.constant)[step]
    return 100.0 * (find(rows, kind, every, asked).loss / raw(rows).loss - 1.0)


def find(rows: Sequence[Row], kind: str, every: int, asked: int) -> Row:
    """One merge of a step. The window of ten may be cut to fewer by another rule, and then is the same merge."""
    return next(row for row in rows if (row.kind, row.every, row.asked) == (kind, every, asked))


def raw(rows: Sequence[Row]) -> Row:
    """The raw model of a step."""
    return rows[0]


def nested(result: Result) -> dict[int, list[Row]]:
    """The means over nested spans of `every: "1%"`, shortest first, by step."""
    found = {
        step: [row for row in rows if row.kind == "sma" and row.every == 0] for step, rows in result.constant.items()
    }
    return {step: sorted(rows, key=lambda row: row.span) for step, rows in found.items() if rows}
