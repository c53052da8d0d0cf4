"""The paper's Figures 4 and 5 of our runs, and what a span is worth. Draws results; returns figures."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablations.gains import Spread, gain, nested, of_cells, raw, unit
from benchmarks.ablations.merges import KINDS
from benchmarks.ablations.records import Result
from benchmarks.ablations.rules import best_share
from benchmarks.ablations.setups import BETWEEN, INTERVALS, NUMBERS, STAGES

_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#8a8f98", "#30343a")
_TEXT, _GRID = "#30343a", "#e6e8eb"
_MODELS = {"dense": "dense", "moe": "mixture of experts"}
_LOWEST, _HIGHEST = -7.0, 10.0  # percent; a bar that leaves the picture says its value
_RAW = "change of the loss against raw (%)"


def figure_4(results: Sequence[Result]) -> Figure:
    """Kinds of coefficients by stage, at two intervals."""
    figure = Figure(figsize=(12.0, 8.0), dpi=110, layout="constrained")
    for row, (cell, name) in zip(figure.subplots(2, 2, sharey="row"), _MODELS.items(), strict=True):
        for axes, part in zip(row, (4, 1), strict=True):
            bars = {kind: _by_stage(results, cell, kind, part, 10) for kind in KINDS}
            _bars(axes, bars, f"{name}: ten snapshots, V = {INTERVALS[part]} of the paper")
    figure.axes[0].legend(loc="lower left", ncols=2, frameon=False, fontsize=8, labelcolor=_TEXT)
    return figure


def figure_5(results: Sequence[Result]) -> Figure:
    """Intervals and numbers of snapshots by stage."""
    figure = Figure(figsize=(12.0, 8.0), dpi=110, layout="constrained")
    for row, (cell, name) in zip(figure.subplots(2, 2, sharey="row"), _MODELS.items(), strict=True):
        intervals = {f"V = {tokens}": _by_stage(results, cell, "sma", part, 10) for part, tokens in INTERVALS.items()}
        _bars(row[0], intervals, f"{name}: plain mean of ten snapshots, by their interval")
        numbers = {f"N = {number}": _by_stage(results, cell, "sma", 4, number) for number in NUMBERS}
        _bars(row[1], numbers, f"{name}: plain mean, V = 8B, by the number of snapshots")
    for axes in figure.axes[:2]:
        axes.legend(loc="lower left", frameon=False, fontsize=9, labelcolor=_TEXT)
    return figure


def spans(results: Sequence[Result]) -> Figure:
    """What a plain mean gains by its span, and where it gains most, in every cell."""
    figure = Figure(figsize=(12.0, 8.0), dpi=110, layout="constrained")
    (dense, moe), (shares, legend) = figure.subplots(2, 2)
    for axes, (cell, name) in zip((dense, moe), _MODELS.items(), strict=True):
        _curves(axes, of_cells(results, cell), f"{name}: plain means of snapshots 1% apart")
    dense.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=_TEXT)
    _best(shares, results)
    legend.axis("off")
    legend.legend(*shares.get_legend_handles_labels(), loc="upper left", frameon=False, labelcolor=_TEXT)
    return figure


def _by_stage(results: Sequence[Result], cell: str, kind: str, part: int, asked: int) -> dict[int, Spread]:
    runs = of_cells(results, cell)
    return {units: Spread.of(gain(run, units, kind, part, asked) for run in runs) for units in STAGES if runs}


def _bars(axes: Axes, bars: dict[str, dict[int, Spread]], title: str) -> None:
    width = 0.84 / len(bars)
    for index, (name, stages) in enumerate(bars.items()):
        x = np.arange(len(stages)) + (index - (len(bars) - 1) / 2) * width
        means = np.array([spread.mean for spread in stages.values()])
        errors = [spread.error for spread in stages.values()]
        axes.bar(x, means, width, yerr=errors, label=name, color=_COLORS[index], error_kw={"lw": 1.0, "ecolor": _TEXT})
        for place, mean in zip(x, means, strict=True):
            if mean > _HIGHEST:
                axes.text(place, _HIGHEST, f"{mean:+.0f}", ha="center", va="top", fontsize=7, color=_TEXT, rotation=90)
    axes.axhline(0.0, color=_TEXT, linewidth=0.9)
    axes.set_ylim(_LOWEST, _HIGHEST)
    axes.set_xticks(range(len(STAGES)), [f"{tokens}\n{units * 2}% of the run" for units, tokens in STAGES.items()])
    _frame(axes, title, _RAW)


def _curves(axes: Axes, runs: Sequence[Result], title: str) -> None:
    stages = sorted((*STAGES, *BETWEEN))
    colors = [f"C{index}" for index in range(len(stages))]
    for units, color in zip(stages, colors, strict=True):
        gains = _gains_by_span(runs, units)
        axes.errorbar(
            list(gains),
            [spread.mean for spread in gains.values()],
            yerr=[spread.error for spread in gains.values()],
            color=color,
            linewidth=1.4,
            elinewidth=0.8,
            label=f"{2 * units}% of the run",
        )
    axes.axhline(0.0, color=_TEXT, linewidth=0.9)
    axes.axvspan(0.08, 0.13, color=_GRID, zorder=0)
    _log_shares(axes)
    _frame(axes, title, _RAW)


def _gains_by_span(runs: Sequence[Result], units: int) -> dict[float, Spread]:
    """By share of the steps so far, which all runs of a cell have alike."""
    gains: dict[float, list[float]] = {}
    for run in runs:
        step = max(step for step in nested(run) if step <= units * unit(run))
        at_raw = raw(run.constant[step]).loss
        for row in nested(run)[step]:
            gains.setdefault(row.span / step, []).append(100.0 * (row.loss / at_raw - 1.0))
    return {share: Spread.of(values) for share, values in gains.items()}


def _best(axes: Axes, results: Sequence[Result]) -> None:
    stages = sorted((*STAGES, *BETWEEN))
    cells = sorted({str(result.setup["cell"]) for result in results})
    for index, cell in enumerate(cells):
        found = [Spread.of(best_share(run, units) for run in of_cells(results, cell)) for units in stages]
        marker = "s" if cell.startswith("moe") else "o"
        place = [2 * units + 0.5 * (index - len(cells) / 2) for units in stages]
        axes.errorbar(
            place,
            [100 * spread.mean for spread in found],
            yerr=[100 * spread.error for spread in found],
            fmt=f"{marker}-",
            color=f"C{index}",
            markersize=4,
            linewidth=0.8,
            elinewidth=0.8,
            label=f"{cell} ({found[0].num} seeds)",
        )
    axes.axhspan(8, 13, color=_GRID, zorder=0)
    axes.set_ylim(0, 30)
    axes.set_xlabel("% of the run", color=_TEXT)
    _frame(axes, "the best span, by stage and cell (grey: 8 to 13%)", "best span (% of the steps so far)")


def _log_shares(axes: Axes) -> None:
    axes.set_xscale("log")
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("span, as a share of the steps so far", color=_TEXT)


def _frame(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", color=_TEXT, fontsize=11)
    axes.set_ylabel(label, color=_TEXT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


FIGURES: dict[str, Callable[[Sequence[Result]], Figure]] = {
    "windows-figure-4": figure_4,
    "windows-figure-5": figure_5,
    "windows-spans": spans,
}
