"""Records to a table in the terminal. This module knows rich and how raw and merged numbers are read side by side."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pretrain_merge.errors import ConfigError, MissingDependencyError, printable
from pretrain_merge.records import Expected, MergeRecord
from pretrain_merge.records.metric_names import did_you_mean
from pretrain_merge.records.modes import Mode, change, is_better, mode_of

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_T = TypeVar("_T")

_LONGEST_NAME = 120  # a name from somebody's file must not push the numbers off the screen


def merges_table(
    records: Sequence[MergeRecord],
    metric: str,
    *,
    title: str | None = None,
    views: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    forecast: str | None = None,
    gap_closed: Mapping[int, float | None] | None = None,
    mode: Mode | None = None,
    at_most: int | None = None,
) -> "Table":
    """One row for each merge point: step, raw, every view, and how far the best view is from raw.

    Args:
        records: Merge points of one run, oldest first, at least one.
        metric: A metric that the records hold. Views better than raw are green, the best one bold, others red.
        title: Title of the table.
        views: Names of the merged views among which the best is; default: all.
        columns: Which of them have a column; default: all.
        forecast: Name of a forecast to show, with its interval; default: none.
        gap_closed: `(raw - merged) / (raw - annealed)` at the steps where a real anneal ended, for a column of its own.
        mode: Whether the smallest value is the best or the largest; None: as the metric's name tells.
        at_most: Rows, at least 3: evenly chosen with the first, the best and the last, as a caption says; None: all.

    Raises:
        ConfigError: No record holds the metric.
        MissingDependencyError: rich is not installed.
    """
    require_rich()
    from rich.table import Table

    # a merge point whose evaluation failed lacks the metric
    measured = [record for record in records if metric in record.raw]
    if not measured:
        known = sorted({name for record in records for name in record.raw})
        raise ConfigError(
            f"metric: {metric!r} is in none of {len(records)} records. Measured: {', '.join(known) or 'nothing'}."
            f"{did_you_mean(metric, known)}"
        )
    # in the order in which they were first measured: views of more snapshots come later
    shown = list(dict.fromkeys(view for record in measured for view in record.shown)) if views is None else views
    forecast_column = [f"forecast:\n{forecast}"] if forecast else []
    table = Table(title=as_text(title) if title else None, title_justify="left")
    columns = shown if columns is None else columns
    for column in ("step", "raw", *columns, "best\nvs raw", *forecast_column, *(["gap\nclosed"] if gap_closed else [])):
        table.add_column(as_text(column), justify="right")
    mode = mode or mode_of(metric)
    rows = measured if at_most is None else _chosen(measured, metric, shown, mode, at_most)
    if len(rows) < len(measured):
        table.caption, table.caption_justify = f"{len(rows)} of {len(measured)} merges", "left"
    for record in rows:
        closed = [percent(gap_closed[record.step]) if record.step in gap_closed else ""] if gap_closed else []
        expected = [expected_cell(record.forecasts.get(forecast, {}).get(metric))] if forecast else []
        table.add_row(*_row(record, metric, shown, columns, mode), *expected, *closed)
    return table


def require_rich() -> None:
    """Refuse to go on without rich, with the one message that says so.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import rich.table  # noqa: F401 - whether it can be
    except ImportError as error:
        raise MissingDependencyError(
            "Tables are printed with rich, which is not installed. Run: pip install 'pretrain-merge[cli]'"
        ) from error


def rank(records: Sequence[MergeRecord], metric: str, mode: Mode) -> Callable[[str], float]:
    """A key that sorts views, the best of the newest merge that has any first."""
    newest = next(
        (record for record in reversed(records) if any(metric in item for item in record.views.values())), None
    )
    values = {} if newest is None else {view: item[metric] for view, item in newest.views.items() if metric in item}
    sign = 1.0 if mode == "min" else -1.0

    def key(view: str) -> float:
        value = sign * values.get(view, math.nan)
        # NaN compares false with every number, and would leave the order to chance
        return math.inf if math.isnan(value) else value

    return key


def as_text(name: str) -> "Text":
    """A name from a file, shown as it is: it may look like rich's markup, or like a command to the terminal."""
    from rich.text import Text

    shown = printable(name, keep="\n")
    return Text(shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}…")


def percent(share: float | None) -> str:
    """A share as a whole percentage; a dash where there is none.

    >>> percent(0.948), percent(None)
    ('95%', '–')
    """
    return "–" if share is None else f"{share:.0%}"


def expected_cell(value: Expected | None) -> str:
    """A forecast with its interval; a dash where there is none."""
    return "–" if value is None else f"{value.mean:.4f} ±{(value.high - value.low) / 2:.4f}"


def _chosen(
    records: Sequence[MergeRecord], metric: str, views: Sequence[str], mode: Mode, at_most: int
) -> list[MergeRecord]:
    if len(records) <= at_most:
        return list(records)
    last = len(records) - 1
    # both ends and evenly between; one row of `at_most` is left for the best
    places = {round(index * last / (at_most - 2)) for index in range(at_most - 1)}
    merged = [index for index, record in enumerate(records) if _values(record, metric, views)]
    # a run that was cut short may have measured raw alone
    if merged:
        places.add(_best(merged, mode, lambda index: _best_value(records[index], metric, views, mode)))
    return [records[place] for place in sorted(places)]


def _best_value(record: MergeRecord, metric: str, views: Sequence[str], mode: Mode) -> float:
    values = _values(record, metric, views)
    return values[_best(values, mode, values.__getitem__)]


def _best(items: Iterable[_T], mode: Mode, value: Callable[[_T], float]) -> _T:
    """NaN is never the best, unless there is nothing else."""
    sign = 1.0 if mode == "min" else -1.0
    return min(items, key=lambda item: sign * value(item) if not math.isnan(value(item)) else math.inf)


def _values(record: MergeRecord, metric: str, views: Sequence[str]) -> dict[str, float]:
    return {view: record.views[view][metric] for view in views if metric in record.views.get(view, {})}


def _row(record: MergeRecord, metric: str, views: Sequence[str], columns: Sequence[str], mode: Mode) -> list[str]:
    raw, values = record.raw[metric], _values(record, metric, views)
    best = _best(values, mode, values.__getitem__) if values else None
    return [
        str(record.step),
        f"{raw:.4f}",
        *(_cell(values.get(view), raw, is_best=view == best, mode=mode) for view in columns),
        f"{share:+.1%}" if best and (share := change(values[best], raw)) is not None else "",
    ]


def _cell(value: float | None, raw: float, *, is_best: bool, mode: Mode) -> str:
    if value is None:
        return "–"
    is_worse = not is_better(value, raw, mode)
    style = "red" if is_worse else "bold green" if is_best else "green"
    return f"[{style}]{value:.4f}[/]"
