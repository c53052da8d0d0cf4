"""Records to matplotlib figures.

This module knows how raw, merged and annealed curves are drawn. It reads records and nothing else, returns figures and
never shows one, and touches no global state of pyplot: a figure made here belongs to the caller alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError, printable
from pretrain_merge.files import atomic
from pretrain_merge.records import Expected, MergeRecord
from pretrain_merge.records.metric_names import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RAW, _ANNEALED, _GRID, _TEXT = "#8a8f98", "#1a1a1a", "#e6e8eb", "#30343a"
# Okabe and Ito's palette: told apart by people with any colour vision, and in print
_VIEWS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
_FORECASTS = ("#7b3294", "#b2182b", "#4d4d4d")
_MAX_MARKERS = 60
_DENSE = 300  # points: beyond, wide lines would run together
_MANY_STEPS = 10_000  # from here on ticks have a unit: 2M, not 2.0 and a 1e6 in a corner
_LONGEST_LABEL = 48  # in the legend, beside the curves
_LONGEST_TITLE = 110
_LARGEST = 1e100
_EARLY = 0.15  # of the run: what lies before may leave the picture, or the early fall would flatten all that follows


def curves(
    records: Sequence[MergeRecord],
    *,
    metric: str = "val_loss",
    views: Sequence[str] | None = None,
    annealed: Mapping[int, float] | None = None,
    ahead: Sequence[Expected] = (),
    label: str | None = None,
    title: str | None = None,
) -> "Figure":
    """Raw, merged views, forecasts and a real anneal against steps; below, how far each is from raw in percent.

    Args:
        records: Merge points of one run, oldest first, at least one.
        metric: A metric that the records hold; smaller or larger may be better.
        views: Names of the merged views to draw; default: all.
        annealed: Metric of a real annealing branch at its steps, if one was trained.
        ahead: Forecasts of anneals that start at the last record, by where they end; they fan out beyond it.
        label: Name of the metric on the axis, with its unit; default: the metric's own name.
        title: Title of the figure; default: none.

    Returns:
        A figure with two axes, values above and differences to raw below. The upper one may cut off the first steps.

    Raises:
        ConfigError: There is no record, or none holds the metric.
        MissingDependencyError: matplotlib is not installed.
    """
    raw = _series(records, metric)
    merged = _views(records, metric, views)
    forecasts = {**_forecasts(records, metric), **({"if annealed from here": list(ahead)} if ahead else {})}
    branch = dict(sorted((annealed or {}).items()))
    figure = _new_figure()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.25))
    # points are marked while they can be told apart, so that gaps and single merges show
    marker, width = "o" if len(records) <= _MAX_MARKERS else "", 1.8 if len(records) <= _DENSE else 0.8
    line = {"linewidth": width, "marker": marker, "markersize": 3.5}
    _draw(upper, raw, "raw", color=_RAW, **line)
    places = list(view_names(records))  # a view has its colour whichever others are drawn
    for index, (view, values) in enumerate(merged.items()):
        turn, place = divmod(places.index(view), len(_VIEWS))
        # where the colours begin anew, the dashes tell views apart
        look = {"color": _VIEWS[place], "linestyle": _DASHES[turn % len(_DASHES)]}
        style = line | look | {"zorder": 3 - index / len(merged)}  # the first on top
        _draw(upper, values, f"merged: {view}", **style)
        _draw(lower, _relative(values, raw), None, **style)
    for index, (name, expected) in enumerate(forecasts.items()):
        _draw_band(upper, expected, f"forecast: {name}", color=_FORECASTS[index % len(_FORECASTS)])
    if branch:
        _draw_branch(upper, branch, "annealed: a real branch")
    _frame(upper, ylabel=label or metric, title=title)
    _frame(lower, ylabel="merged − raw (%)", xlabel="step")
    bands = [ends for expected in forecasts.values() for ends in _ends(expected)]
    _focus(upper, [raw, *merged.values(), *bands, branch])
    _focus(lower, [_relative(values, raw) for values in merged.values()], around=0.0)
    lower.axhline(0.0, color=_RAW, linewidth=1.5, zorder=1)
    if max(raw) >= _MANY_STEPS:
        lower.xaxis.set_major_formatter(_thousands)
    legend = upper.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),  # beside the curves: the layout makes room for it
        frameon=False,
        labelcolor=_TEXT,
        title="at the last step",
        title_fontproperties={"size": 9},
        alignment="left",
    )
    legend.get_title().set_color(_TEXT)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a file, in the format that its name ends in.

    Raises:
        ConfigError: No figure has that format.
        CheckpointError: The file cannot be written.
    """
    kind = path.suffix.removeprefix(".").lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise ConfigError(f"picture: {str(path)!r} does not end in a format of pictures. Allowed: {known}.")
    try:
        atomic.write(path, rendered(figure, kind).getvalue())
    except OSError as error:
        why = error.strerror or error  # the whole would name a temporary file
        raise CheckpointError(f"cannot write {path}: {why}. Name a file in a folder that can be written.") from error


def rendered(figure: "Figure", kind: str = "png") -> BytesIO:
    """A figure as the bytes of a file, in a format that its canvas knows."""
    drawn = BytesIO()
    figure.savefig(drawn, format=kind)
    drawn.seek(0)
    return drawn


def view_names(records: Iterable[MergeRecord]) -> dict[str, None]:
    """Names of all views in the order of the configuration, which is that of a record that has them all.

    Early records lack the views that need a longer window, so the fullest record comes first; views of no other record
    with as many, as after a change of the configuration, follow.
    """
    found = {tuple(record.shown): None for record in records}
    return dict.fromkeys(name for names in sorted(found, key=len, reverse=True) for name in names)


def _new_figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Figures are drawn with matplotlib, which is not installed. Run: pip install 'pretrain-merge[plots]'"
        ) from error
    # a Figure of its own brings the non-interactive Agg canvas: it works without a display
    return Figure(figsize=(9.6, 5.6), dpi=160, layout="constrained")


def _series(records: Sequence[MergeRecord], metric: str) -> dict[int, float]:
    values = {record.step: record.raw[metric] for record in records if metric in record.raw}
    if not values:
        known = sorted({name for record in records for name in record.raw})
        raise ConfigError(
            f"metric: {metric!r} is in none of the {len(records)} records. "
            f"Measured: {', '.join(known) or 'nothing'}.{did_you_mean(metric, known)} "
            f"Name one of these, or records of a run that measured it."
        )
    return values


def _views(records: Sequence[MergeRecord], metric: str, chosen: Sequence[str] | None) -> dict[str, dict[int, float]]:
    """Values of each view in the order of the configuration; a skipped view has a gap in its steps."""
    names = view_names(records)
    if chosen is not None:
        if unknown := [view for view in chosen if not any(view in record.views for record in records)]:
            raise ConfigError(f"views: {unknown} are in no record. Measured: {', '.join(names)}.")
        names = dict.fromkeys(chosen)
    return {
        view: {record.step: record.views[view][metric] for record in records if metric in record.views.get(view, {})}
        for view in names
    }


def _forecasts(records: Sequence[MergeRecord], metric: str) -> dict[str, list[Expected]]:
    """What each forecast expected, in the order in which their anneals end."""
    names = dict.fromkeys(name for record in records for name in record.forecasts)
    found = {
        name: [record.forecasts[name][metric] for record in records if metric in record.forecasts.get(name, {})]
        for name in names
    }
    return {name: sorted(items, key=lambda item: item.step) for name, items in found.items() if items}


def _relative(values: Mapping[int, float], raw: Mapping[int, float]) -> dict[int, float]:
    """Differences to raw in percent of raw, at the steps where both were measured."""
    return {
        step: 100.0 * (value - raw[step]) / abs(raw[step])
        for step, value in values.items()
        if raw.get(step, 0.0) != 0.0
    }


def _draw(axes: "Axes", values: Mapping[int, float], label: str | None, **style: Any) -> None:
    (line,) = axes.plot(list(values), [_drawable(value) for value in values.values()], **style)
    if label and values:
        line.set_label(f"{list(values.values())[-1]:#.4g}  {_literal(label)}")


def _draw_band(axes: "Axes", expected: Sequence[Expected], label: str, *, color: str) -> None:
    steps = [item.step for item in expected]
    low, high = ([_drawable(value) for value in ends.values()] for ends in _ends(expected))
    if len(expected) == 1:  # a band of one step would not be seen
        axes.vlines(steps, low, high, color=color, linewidth=3, alpha=0.4)
    axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0, zorder=1)
    means = {item.step: item.mean for item in expected}
    _draw(axes, means, label, color=color, linewidth=1.6, linestyle=(0, (1, 1)), zorder=4)


def _ends(expected: Sequence[Expected]) -> list[dict[int, float]]:
    return [{item.step: item.low for item in expected}, {item.step: item.high for item in expected}]


def _draw_branch(axes: "Axes", values: Mapping[int, float], label: str | None) -> None:
    _draw(axes, values, label, color=_ANNEALED, linewidth=1.8, linestyle=(0, (4, 1.5)))
    axes.plot(*list(values.items())[-1], marker="*", markersize=11, color=_ANNEALED, markeredgecolor="white", zorder=5)


def _frame(axes: "Axes", *, ylabel: str, xlabel: str | None = None, title: str | None = None) -> None:
    axes.set_ylabel(_literal(ylabel), color=_TEXT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    if xlabel:
        axes.set_xlabel(xlabel, color=_TEXT)
    if title:
        axes.set_title(_literal(title, _LONGEST_TITLE), loc="left", color=_TEXT, fontsize=11)


def _thousands(step: float, _: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(step) >= size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"


def _drawable(value: float) -> float:
    """A gap where a value is beyond what an axis can span: its distance to another is not a number any more."""
    return value if abs(value) < _LARGEST else math.nan


def _literal(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Text as it is: a file may name a metric like a formula, and matplotlib would try to set it."""
    return printable(text)[:longest].replace("$", r"\$")


def _focus(axes: "Axes", curves: Sequence[Mapping[int, float]], *, around: float | None = None) -> None:
    """Fit the y axis to what comes after the early part of the run."""
    steps = [step for values in curves for step in values]
    early = min(steps) + _EARLY * (max(steps) - min(steps)) if steps else 0
    late = [value for values in curves for step, value in values.items() if step >= early and abs(value) < _LARGEST]
    late += [] if around is None else [around]
    if not late:
        return
    low, high = min(late), max(late)
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
