"""Every anneal of the suite, predicted by a calibration that never saw its run. Draws answers; returns the figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.forecast.splits import FORECASTER, Answer

_COLORS = {"raw": "#8a8f98", "merged": "#0072b2", FORECASTER: "#b2182b"}
_TEXT, _GRID = "#30343a", "#e6e8eb"
_KINDS = {"nowcast": "Nowcast: the anneal ends now", "forecast": "Forecast: the anneal starts now, up to 30% ahead"}
_LIMITS = {"nowcast": 2.0, "forecast": 6.0}  # percent


def predictions(answers: Sequence[Answer], watching: str = "dense") -> Figure:
    """Predicted against true on top; below, the errors with their intervals, run by run."""
    shown = [answer for answer in answers if answer.case.watching == watching and answer.case.is_calibrated_on]
    figure = Figure(figsize=(12.0, 12.5), dpi=110, layout="constrained")
    top, *below = figure.subfigures(3, 1, height_ratios=(1.15, 1, 1))
    for axes, kind in zip(top.subplots(1, 2), _KINDS, strict=True):
        _scatter(axes, [answer for answer in shown if answer.case.kind == kind], _KINDS[kind])
    for part, kind in zip(below, _KINDS, strict=True):
        mine = [answer for answer in shown if answer.case.kind == kind and answer.method == FORECASTER]
        _errors(part.subplots(), mine, kind)
    return figure


def _scatter(axes: Axes, answers: Sequence[Answer], title: str) -> None:
    for method, color in _COLORS.items():
        points = [(a.case.loss, a.mean) for a in answers if a.method == method]
        size, alpha = (9, 0.9) if method == FORECASTER else (12, 0.45)
        label = f"{method} ({len(points)} anneals)" if method == FORECASTER else method
        axes.scatter(*zip(*points, strict=True), s=size, alpha=alpha, color=color, linewidths=0, label=label)
    ends = [min(a.case.loss for a in answers), max(a.mean for a in answers)]
    axes.plot(ends, ends, color=_TEXT, linewidth=0.8, zorder=0)
    _frame(axes, title)
    axes.set_xlabel("true loss at the anneal's end", color=_TEXT)
    axes.set_ylabel("predicted loss", color=_TEXT)
    axes.legend(loc="upper left", frameon=False, labelcolor=_TEXT)


def _errors(axes: Axes, answers: Sequence[Answer], kind: str) -> None:
    names = sorted({a.case.run.name for a in answers})
    limit = _LIMITS[kind]
    for place, name in enumerate(names):
        mine = sorted((a for a in answers if a.case.run.name == name), key=lambda a: (a.case.progress, a.case.now))
        x = place + np.linspace(-0.38, 0.38, len(mine))
        losses = np.array([a.case.loss for a in mine])
        errors = 100 * (np.array([a.mean for a in mine]) / losses - 1)
        halves = 100 * np.array([a.half or 0.0 for a in mine]) / losses
        missed = np.abs(errors) > halves
        axes.vlines(x, errors - halves, errors + halves, color=_COLORS["merged"], alpha=0.22, linewidth=1.5)
        for chosen, color in ((~missed, _TEXT), (missed, _COLORS[FORECASTER])):
            axes.scatter(x[chosen], np.clip(errors[chosen], -limit, limit), s=8, color=color, linewidths=0, zorder=3)
    axes.axhline(0.0, color=_TEXT, linewidth=0.8, zorder=1)
    for place in range(1, len(names)):
        axes.axvline(place - 0.5, color=_GRID, linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(-1.03 * limit, 1.03 * limit)
    axes.set_ylabel("predicted − true (% of true)", color=_TEXT)
    _frame(axes, f"{kind}: error and 90% interval of every anneal, in order of training (red: the interval misses 0)")


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_TEXT, fontsize=11)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
