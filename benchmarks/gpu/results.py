"""What a part found: one row a figure, written at once, so that a part that dies later has lost nothing.

Knows how results are kept and shown. Only the standard library: it runs where nothing else may import.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_HEADINGS = ("part", "what", "case", "measured", "plan says", "must be", "")
_BOUNDS = {"at_least": ">=", "at_most": "<="}


class Report:
    """Collects rows of one part into a file, a line each."""

    def __init__(self, path: Path, part: str) -> None:
        self._path = path
        self._part = part

    def __call__(
        self,
        what: str,
        case: str,
        value: float | bool | None,
        unit: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        predicted: float | None = None,
        **about: Any,
    ) -> None:
        """Keep one figure.

        Args:
            what: What was measured.
            case: On what.
            value: The figure; a bool for what holds or does not; None where the plan alone was asked.
            unit: Of the figure and of the prediction; "%" takes shares.
            at_least: The target, if there is one.
            at_most: The same from above.
            predicted: What the plan says.
            **about: Further figures for the JSON file.
        """
        row = {
            "part": self._part,
            "what": what,
            "case": case,
            "value": value,
            "unit": unit,
            "predicted": predicted,
            "at_least": at_least,
            "at_most": at_most,
            "met": _is_met(value, at_least, at_most),
        } | about
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; of one that is not there, none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _is_met(value: float | bool | None, at_least: float | None, at_most: float | None) -> bool | None:
    """None where nothing is asked. NaN meets nothing."""
    if value is None or (at_least is None and at_most is None and not isinstance(value, bool)):
        return None
    if isinstance(value, bool):
        return value
    return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one column under another, for any terminal."""
    lines = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    value, unit = row["value"], row["unit"]
    bounds = [f"{sign} {_number(row[key], unit)}" for key, sign in _BOUNDS.items() if row[key] is not None]
    verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
    predicted = "" if row["predicted"] is None else _number(row["predicted"], unit)
    return row["part"], row["what"], row["case"], _number(value, unit), predicted, " ".join(bounds), verdict


def _number(value: float | bool | str | None, unit: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{100 * value:.3g}%"
    if unit == "s" and value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:,.4g} {unit}".rstrip()
