"""The merges of a run as a table that fits the terminal. This module knows widths, and no command."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain_merge.errors import printable
from pretrain_merge.records import MergeRecord, plots, tables
from pretrain_merge.records.modes import Mode

if TYPE_CHECKING:
    from rich.console import Console


def print_merges(
    console: "Console",
    records: Sequence[MergeRecord],
    metric: str,
    mode: Mode,
    *,
    title: str | None = None,
    at_most: int | None,
    all_rows: str,
    all_views: str,
) -> None:
    """Print a table with as many views as the terminal has room for, the best of the newest merge first.

    Args:
        console: Where to.
        records: Merge points of one run, oldest first.
        metric: A metric that they hold.
        mode: Whether its smallest value is the best or its largest.
        title: Above the table.
        at_most: Rows; None: all.
        all_rows: How to see the rows that are left out, for the line that says so.
        all_views: How to see the views that are left out.
    """
    from rich.measure import Measurement

    views = [view for view in plots.view_names(records) if any(metric in item.views.get(view, {}) for item in records)]
    # where columns are left out, the best stay; shown in the order of the configuration
    ranked = sorted(views, key=tables.rank(records, metric, mode))
    for number in range(len(views), -1, -1):
        columns = [view for view in views if view in ranked[: max(1, number)]]
        table = tables.merges_table(
            records, metric, mode=mode, title=title, views=views, columns=columns, at_most=at_most
        )
        # measured as if there were room: else it is as wide as it may be
        unbounded = console.options.update(max_width=10_000)
        if number <= 1 or Measurement.get(console, unbounded, table).maximum <= console.width:
            break
    rows, table.caption = table.caption, None
    console.print(table)
    if rows:
        console.print(f"{rows}; {all_rows}.", soft_wrap=True, markup=False)
    if hidden := [printable(view) for view in views if view not in columns]:
        note = f"No room for {', '.join(hidden)}; best vs raw is of all. {all_views}."
        console.print(note, soft_wrap=True, markup=False)
