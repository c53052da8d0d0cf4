"""Records to a table in the terminal. This module knows rich and how raw and merged numbers are read side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pretrain_merge.errors import ConfigError, MissingDependencyError, printable
from pretrain_merge.records import Expected, MergeRecord

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


_LONGEST_NAME = 120


def merges_table(
    records: Sequence[MergeRecord],
    metric: str,
    *,
    title: str | None = None,
    views: Sequence[str] | None = None,
    forecast: str | None = None,
    gap_closed: Mapping[int, float | None] | None = None,
) -> "Table":
    """One row for each merge point: step, raw, every view, and how far the lowest view is from raw.

    Args:
        records: Merge points of one run, oldest first, at least one.
        metric: A metric that the records hold. Views below raw are green, the lowest one bold, views above raw red.
        title: Title of the table.
        views: Names of the merged views to show; default: all.
        forecast: Name of a forecast to show, with its interval; default: none.
        gap_closed: `(raw - merged) / (raw - annealed)` at the steps where a real anneal ended, for a column of its own.

    Raises:
        ConfigError: No record holds the metric.
        MissingDependencyError: rich is not installed.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise MissingDependencyError(
            "Tables are printed with rich, which is not installed. Run: pip install 'pretrain-merge[cli]'"
        ) from error
    measured = [record for record in records if metric in record.raw]
    if not measured:
        known = sorted({name for record in records for name in record.raw})
        raise ConfigError(f"metric: {metric!r} is in none of {len(records)} records. Measured: {', '.join(known)}.")
    shown = list(dict.fromkeys(view for record in measured for view in record.views)) if views is None else views
    forecast_column = [f"forecast:\n{forecast}"] if forecast else []
    table = Table(title=as_text(title) if title else None, title_justify="left")
    for column in ("step", "raw", *shown, "best\nvs raw", *forecast_column, *(["gap\nclosed"] if gap_closed else [])):
        table.add_column(as_text(column), justify="right")
    for record in measured:
        closed = [percent(gap_closed[record.step]) if record.step in gap_closed else ""] if gap_closed else []
        expected = [expected_cell(record.forecasts.get(forecast, {}).get(metric))] if forecast else []
        table.add_row(*_row(record, metric, shown), *expected, *closed)
    return table


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


def _row(record: MergeRecord, metric: str, views: Sequence[str]) -> list[str]:
    raw = record.raw[metric]
    values = {view: record.views[view][metric] for view in views if metric in record.views.get(view, {})}
    best = min(values, key=lambda view: values[view]) if values else None
    return [
        str(record.step),
        f"{raw:.4f}",
        *(_cell(values.get(view), raw, is_best=view == best) for view in views),
        f"{values[best] / raw - 1:+.1%}" if best and raw else "",
    ]


def _cell(value: float | None, raw: float, *, is_best: bool) -> str:
    if value is None:
        return "–"
    style = "red" if value > raw else "bold green" if is_best else "green"
    return f"[{style}]{value:.4f}[/]"
