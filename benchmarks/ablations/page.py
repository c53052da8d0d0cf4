"""The numbers of `docs/windows.md`: tables between marks, written from the records. Knows Markdown; judges nothing."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import pages
from benchmarks.ablations import further, rules
from benchmarks.ablations.claims import LATE, claims
from benchmarks.ablations.gains import Spread, gain, of_cells
from benchmarks.ablations.merges import KINDS
from benchmarks.ablations.records import Result
from benchmarks.ablations.setups import BETWEEN, CELLS, INTERVALS, STAGES
from benchmarks.first_run.runs import FILE, verdicts
from benchmarks.pages import table

PAGE = Path(__file__).parents[2] / "docs" / "windows.md"
_SETTLED = [units for units in sorted((*STAGES, *BETWEEN)) if units >= 12]  # from a quarter of the run on


def written(text: str, results: Sequence[Result]) -> str:
    """The page with every table as the records have it."""
    return pages.written(text, TABLES, results)


def _claims(results: Sequence[Result]) -> str:
    return table(["the paper", "here, dense / mixture of experts", "verdict"], claims(results))


def _regret(results: Sequence[Result]) -> str:
    rows = rules.table(rules.regrets(results, rules.CHOICES))
    cells = [(row["rule"], f"{row['mean']:.3f}%", f"{row['max']:.2f}%", row["worst_at"]) for row in rows]
    return table(["rule", "mean", "worst", "worst at"], cells)


def _cells(results: Sequence[Result]) -> str:
    rows = []
    for cell in CELLS:
        runs = of_cells(results, cell)
        if runs:
            setup = runs[0].setup
            shares = Spread.of(rules.best_share(run, units) for run in runs for units in _SETTLED)
            even = [rules.break_even(run, units) for run in runs for units in _SETTLED]
            ends = Spread.of(_best_gain(run) for run in runs)
            rows.append(
                (
                    cell,
                    f"{runs[0].parameters / 1e3:.0f}k",
                    f"{setup['optimizer']}, {setup['peak_lr']:g}, batch {setup['batch_size']}, {setup['num_steps']}",
                    str(len(runs)),
                    f"{shares.mean:.1%} ± {shares.error:.1%}",
                    f"{_median(even):.0%}",
                    f"{ends.mean:+.1f}%",
                )
            )
    heads = ["cell", "size", "optimizer, rate, batch, steps", "seeds", "best span", "breaks even at", "gain at the end"]
    return table(heads, rows)


def _kinds(results: Sequence[Result]) -> str:
    runs, places = of_cells(results, "dense", "moe"), [(part, units) for part in (4, 1) for units in STAGES]

    def cell(kind: str, part: int, units: int) -> str:
        return f"{Spread.of(gain(run, units, kind, part) for run in runs).mean:+.2f}%"

    heads = [f"{STAGES[units]}, V = {INTERVALS[part]}" for part, units in places]
    return table(["kind", *heads], [(kind, *(cell(kind, *place) for place in places)) for kind in (*KINDS, "block")])


def _further(results: Sequence[Result]) -> str:
    found = further.gains(results)
    num = len({(gain.cell, gain.units) for gain in found})
    rows = [
        (way, f"{spread.mean:+.3f}%", f"{worst:+.2f}%", f"{below} of {spread.num}")
        for way, spread, worst, below in further.table(found)
    ]
    return table([f"way, {num} cells and stages", "mean", "worst", "below step 0"], rows)


def _routing(results: Sequence[Result]) -> str:
    rows = []
    for cell in CELLS:
        found = [(step, item) for run in of_cells(results, cell) for step, item in run.routing.items()]
        for step in sorted({step for step, _ in found}):
            rows.append((cell, str(step), *_routers([item for at, item in found if at == step])))
    heads = ["balance, raw", "merged", "entropy, raw", "merged", "exchanged by the merge", "by training"]
    return table(["cell", "step", *heads], rows)


def _routers(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over seeds."""
    states = [
        fmean(item[model][key] for item in found) for key in ("balance", "entropy") for model in ("raw", "merged")
    ]
    drifts = [fmean(item[key] for item in found) for key in ("drift", "drift_of_training")]
    return [*(f"{mean:.3f}" for mean in states), *(f"{mean:.1%}" for mean in drifts)]


def _first_run(results: Sequence[Result]) -> str:
    rows = [
        (
            _LINES[row["lines"]],
            row["view"],
            row["family"],
            row["lr"],
            f"{row['below']} of {row['merges']} ({row['share']:.1%})",
            f"{row['above_at_worst']:.2%}",
            f"{row['at_end']:+.1%}",
        )
        for row in sorted(verdicts(FILE), key=_place)
    ]
    return table(["lines", "view", "model", "rate", "below raw", "above at worst", "at the end"], rows)


_LINES = {"readme": '`window=10, every="1%"`', "fixed": "`window=10, every=100`"}


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """README's lines first, all models first, the lowest rate first."""
    rate = 0.0 if row["lr"] == "all" else float(row["lr"])
    return list(_LINES).index(row["lines"]), row["view"], row["family"] != "all", row["family"], rate


TABLES: Mapping[str, Callable[[Sequence[Result]], str]] = {
    "claims": _claims,
    "regret": _regret,
    "further": _further,
    "cells": _cells,
    "kinds": _kinds,
    "routing": _routing,
    "first-run": _first_run,
}


def _best_gain(run: Result) -> float:
    return min(gain(run, LATE, "sma", part, asked) for part in (8, 4, 2, 1) for asked in (3, 6, 10, 15))


def _median(values: Sequence[float]) -> float:
    """Where a mean was better than raw over every span that was measured, the break-even lies beyond all others."""
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    return ordered[len(ordered) // 2]
