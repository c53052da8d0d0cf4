"""What becomes of restarts step by step, against their controls. Draws results; returns figures."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.restart.gains import Value, at, gain, norm, of_question
from benchmarks.restart.records import Result
from benchmarks.restart.setups import AFTER

_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#8a8f98", "#30343a")
_TEXT, _GRID = "#30343a", "#e6e8eb"
_STEPS = (0, 10, 20, 50, 100, 200, 350, AFTER)
_LINEAR = 10  # steps up to which the axis is linear


def constant_rate(results: Sequence[Result]) -> Figure:
    """A merge put back into a run at constant rate, without a shock and after one."""
    figure = Figure(figsize=(12.0, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = ("merge, newest", "merge, average", "merge, fresh", "merge of 3, newest", "raw, fresh", "raw deeper, newest")
    _curves(left, of_question(results, "constant"), arms, "raw, newest", "nothing has happened: merge and go on")
    arms = ("no restart", "rewind", "rewind deeper", "merge of 3, newest", "merge of 10, newest")
    _curves(right, of_question(results, "shock"), arms, "never shocked", "five batches of noise")
    return figure


def continued(results: Sequence[Result]) -> Figure:
    """Another text: the loss on it, and the norm of the gradient."""
    figure = Figure(figsize=(12.0, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    found = of_question(results, "continued")
    arms = ("merge, full", "raw deeper, full", "annealed, full")
    _curves(left, found, arms, "raw, full", "another text, full schedule")
    places = {first + 10: norm(first, first + 10) for first in range(0, AFTER, 10)}
    _lines(right, found, arms[:1], "raw, full", places)
    _frame(right, "the same: norm of the gradient, means of ten steps", "against raw (%)")
    return figure


FIGURES: dict[str, Callable[[Sequence[Result]], Figure]] = {
    "rescue-constant-rate": constant_rate,
    "rescue-continued": continued,
}


def _curves(axes: Axes, results: Sequence[Result], arms: Sequence[str], control: str, title: str) -> None:
    _lines(axes, results, arms, control, {step: at(step) for step in _STEPS})
    axes.set_xscale("symlog", linthresh=_LINEAR, linscale=0.4)
    axes.set_xticks(_STEPS, [str(step) for step in _STEPS])
    axes.minorticks_off()
    _frame(axes, title, f"loss against {control} (%)")


def _lines(axes: Axes, results: Sequence[Result], arms: Sequence[str], control: str, places: dict[int, Value]) -> None:
    for name, color in zip(arms, _COLORS, strict=False):
        found = {step: gain(results, name, control, value) for step, value in places.items()}
        spreads = {step: spread for step, spread in found.items() if spread is not None}
        means, errors = ([getattr(spread, key) for spread in spreads.values()] for key in ("mean", "error"))
        axes.errorbar(list(spreads), means, yerr=errors, label=name, color=color, linewidth=1.5, elinewidth=0.8)


def _frame(axes: Axes, title: str, label: str) -> None:
    axes.axhline(0.0, color=_TEXT, linewidth=0.9)
    axes.set_title(title, fontsize=10, color=_TEXT, loc="left")
    axes.set_xlabel("steps since the restart", fontsize=9, color=_TEXT)
    axes.set_ylabel(label, fontsize=9, color=_TEXT)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, labelcolor=_TEXT)
