"""Rows of errors: how far predictions are off, how often intervals hold the truth. Knows no way to predict."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.annealing.records import Run
from benchmarks.forecast.splits import FORECASTER, Answer

_RESAMPLES = 1000
Floats = NDArray[np.float64]


def rows_of(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One row for each split, way of watching, reach and method; all numbers are fractions of the true loss."""
    groups: dict[tuple[str, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.split, answer.case.watching, answer.case.reach, answer.method].append(answer)
    medians = {key: _score(group)["median"] for key, group in groups.items()}
    rows = []
    for (split, watching, kind, method), group in groups.items():
        row = {"method": method, "split": split, "watching": watching, "kind": kind, **_score(group)}
        if method.startswith(FORECASTER):
            for other in ("merged", "raw"):
                theirs = medians.get((split, watching, kind, other))
                row[f"ratio_to_{other}"] = theirs / row["median"] if theirs else None
        rows.append(row)
    return rows


def worse_than_merged(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Nowcasts by run beside the plain mean alone: by how much the median error is larger, and in what share of runs.

    That share stands under `bias`.
    """
    rows = []
    for watching in sorted({answer.case.watching for answer in answers}):
        mine = [a for a in answers if a.case.watching == watching and a.case.kind == "nowcast"]
        more = []
        for name in sorted({answer.case.run.name for answer in mine}):
            of_run = [answer for answer in mine if answer.case.run.name == name]
            ours, merged = (
                float(np.median([abs(mean / a.case.loss - 1) for a, mean in pairs]))
                for pairs in ([(a, a.mean) for a in of_run], [(a, a.case.merged) for a in of_run])
            )
            more.append(ours - merged)
        row = _errors(np.maximum(more, 0.0)) | {"bias": float(np.mean(np.array(more) > 0))}
        rows.append({"method": "worse than merged", "split": "by run", "watching": watching, "kind": "nowcast", **row})
    return rows


def floor(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What no forecast from the run can know: how an anneal's end differs between data orders, and between shapes.

    Ahead: each data order of a repeated branch against the mean of the others. Nowcast: cosine against linear anneals
    over the same batches, less their typical difference, over the root of two.
    """
    orders, shapes = [], []
    for run in runs:
        branches: dict[tuple[int, int, str], list[float]] = defaultdict(list)
        for branch in run.anneals:
            branches[branch["start"], branch["steps"], branch["shape"]].append(branch["loss"])
        for losses in branches.values():
            all_but = [(sum(losses) - loss) / max(1, len(losses) - 1) for loss in losses]
            orders += [a / b - 1 for a, b in zip(all_but, losses, strict=True)] if len(losses) > 1 else []
        for (start, steps, shape), (loss, *_) in branches.items():
            if shape == "cosine" and (start, steps, "linear") in branches:
                shapes.append(loss / branches[start, steps, "linear"][0] - 1)
    pairs = (np.array(shapes) - np.median(shapes)) / np.sqrt(2)
    rows = [
        ("mean of other data orders", "forecast 10%", np.array(orders)),
        ("same batches, other shape", "nowcast", pairs),
    ]
    return [
        {"method": method, "split": "floor", "watching": "-", "kind": kind, **_errors(errors)}
        for method, kind, errors in rows
        if len(errors)
    ]


def _score(answers: Sequence[Answer]) -> dict[str, Any]:
    losses = np.array([answer.case.loss for answer in answers])
    errors = np.array([answer.mean for answer in answers]) / losses - 1.0
    row = _errors(errors)
    if any(answer.half is None for answer in answers):
        return row
    halves = np.array([answer.half for answer in answers]) / losses
    means = np.array([answer.mean for answer in answers]) / losses
    held = ((means * np.exp(-halves / means) <= 1) & (means + halves >= 1)).astype(np.float64)
    low, high = _bootstrap(held, [answer.case.run.name for answer in answers])
    return row | {
        "coverage": float(held.mean()),
        "coverage_low": low,
        "coverage_high": high,
        "width": float(np.median(2 * halves)),
    }


def _errors(errors: Floats) -> dict[str, Any]:
    return {
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


def _bootstrap(held: Floats, runs: Sequence[str]) -> tuple[float, float]:
    """5th and 95th percentile of the coverage over runs drawn again: a run's anneals are not independent."""
    _, index = np.unique(runs, return_inverse=True)
    sums, counts = np.bincount(index, held), np.bincount(index)
    drawn = np.random.default_rng(0).integers(0, len(counts), (_RESAMPLES, len(counts)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), (0.05, 0.95))
    return float(low), float(high)
