"""The law on figures of other people's logs, where one mean and no history is known: nothing is fitted to them.

A row of `external-anneals.json` has the loss of the live model (`raw`), of the best mean of a sweep of lengths
(`merged`) and of a real linear anneal (`annealed`), all at step `end`; the anneal started at `start`. Where a mean is
the best of its kind, a longer one loses by lying farther back what it gains in noise, and that gives the slope of the
curve that nobody logged: with the noise left as 1 / span, slope * span / (2 end) = J. The best span is a tenth of the
steps (the page on merging early has it), 5,000 steps at most, as the sweep of those logs had it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_merge.forecast.calibration import Calibration
from pretrain_merge.forecast.law import DOUBTS, Reading
from pretrain_merge.forecast.quadratic import typical_ratio

_FILE = Path(__file__).with_name("external-anneals.json")
_COVERAGE = 0.9
_BEST_SPAN, _LONGEST_SPAN = 0.1, 5000


def rows(calibration: Calibration) -> list[dict[str, Any]]:
    """One row for each way to say where the anneals ended."""
    known = json.loads(_FILE.read_text(encoding="utf-8"))["rows"]
    losses = np.array([row["annealed"] for row in known])
    readings = [reading_of(row) for row in known]
    means = np.array([calibration.expected(reading) for reading in readings])
    intervals = np.array([calibration.interval(reading, _COVERAGE) for reading in readings])
    held = (intervals[:, 0] <= losses) & (losses <= intervals[:, 1])
    ours = {"coverage": float(held.mean()), "width": float(np.median((intervals[:, 1] - intervals[:, 0]) / losses))}
    others = {name: np.array([row[name] for row in known]) for name in ("merged", "raw")}
    return [_row("forecaster", means / losses - 1) | ours, *(_row(name, x / losses - 1) for name, x in others.items())]


def reading_of(row: Mapping[str, float]) -> Reading:
    """The reduced form: Jensen's gap by the usual memory, the slope by the mean's being the best."""
    base, end, steps = row["merged"], row["end"], row["end"] - row["start"]
    span = min(_BEST_SPAN * end, _LONGEST_SPAN)
    gap = row["raw"] - base
    halves = gap * typical_ratio(span)
    slope = 2 * end / span * halves
    fall = slope * np.log((end - steps / 2) / (end - span / 2))
    left = halves * span / steps
    doubts = {
        "base": base,
        "noise times share": gap * steps / end,
        "fall": abs(fall),
        "halves": left,
        "bend": abs(fall) / 3,
    }
    return Reading(
        base=base,
        terms=np.array([left, 0.0, -gap * steps / end, -fall]) / base,
        doubts=np.array([doubts.get(name, 0.0) for name in DOUBTS]) / base,
        gap=gap / base,
        ratio=typical_ratio(span),
        share=steps / end,
        steps=steps,
        end=end,
        is_reduced=True,
    )


def _row(method: str, errors: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    return {
        "method": method,
        "split": "others' logs",
        "watching": "one mean",
        "kind": "nowcast",
        "median": float(np.median(np.abs(errors))),
        "p90": float(np.quantile(np.abs(errors), 0.9)),
        "worst": float(np.max(np.abs(errors))),
        "bias": float(np.mean(errors)),
        "coverage": None,
        "coverage_low": None,
        "coverage_high": None,
        "width": None,
        "ratio_to_merged": None,
        "ratio_to_raw": None,
        "n": len(errors),
    }
