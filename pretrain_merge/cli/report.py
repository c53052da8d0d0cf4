"""The command `pretrain-merge report`: runs to tables, a picture, one page for a browser, and JSON.

This module knows the command's options and where its results go. What they show is `pretrain_merge.records`' business.
"""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain_merge.cli.results import console_beside, write_picture, write_result
from pretrain_merge.cli.run_names import folder_of, run_names
from pretrain_merge.errors import ConfigError, printable
from pretrain_merge.files import untrusted
from pretrain_merge.records import MergeRecord, metric_names, plots, read_run, tables
from pretrain_merge.records.modes import Mode, mode_of

if TYPE_CHECKING:
    from rich.console import Console

_ROWS = 40  # a screen, and all merges of a run with the README's lines
_CONFIG, _LARGEST_CONFIG = "merges.config.yaml", 2**16


def report(
    runs: list[Path],
    *,
    metric: str = "val_loss",
    mode: Literal["min", "max"] | None = None,
    all: bool = False,  # noqa: A002 - the option's name
    name: str = "merge",
    picture: Path | None = None,
    html: Path | None = None,
    json: Path | None = None,
) -> None:
    """Print the merges of a run as a table, and draw its curves; several runs are compared on one page.

    Args:
        runs: Each a run's folder, its merges.jsonl, a CSV of its metrics, or the .wandb file of an offline run.
        metric: The metric to compare; val_loss is also val/loss.
        mode: Whether its smallest value is the best or its largest; default: as its name tells.
        all: Print every merge; else the first, the best, the last, and some between.
        name: Prefix of the metrics, for a CSV or a W&B run.
        picture: Where the picture of a single run goes; default: report.png in its folder.
        html: Where a page for a browser goes: curves to zoom, tables, configuration and files, in one file.
        json: Where the records go, too; - is standard output.
    """
    if not runs:
        raise ConfigError("runs: none is named. Allowed: folders of runs, merges.jsonl, CSV or .wandb files.")
    if picture is not None and len(runs) > 1:
        raise ConfigError(f"picture: is of one run, and {len(runs)} are named. Name one, or overlay them with --html.")
    console = console_beside(json)
    names = run_names(runs)
    records = {run: read_run.read_run(run, name=name, needs_recipes=False) for run in runs}
    known = dict.fromkeys(key for items in records.values() for key in items[-1].raw)
    # else as it was typed, so that the error names what the user wrote
    metric = metric_names.found(metric, known) or metric
    for run in runs:
        title = names[run] if len(runs) > 1 else None
        _print_table(console, records[run], metric, mode or mode_of(metric), title=title, every=all)
    if len(runs) == 1:
        (run,) = runs

        def draw(path: Path) -> None:
            plots.save(plots.curves(records[run], metric=metric, title=names[run]), path)

        write_picture(console, draw, picture, folder_of(run) / "report.png", what="Curves")
    if html is not None:
        write_result(html, _page(records, names, metric, mode, html))
        console.print(f"Page: {printable(html)}", soft_wrap=True, markup=False)
    if json is not None:
        write_result(json, json_format.dumps([_plain(names[run], records[run]) for run in runs], indent=1) + "\n")


def _print_table(
    console: "Console", records: Sequence[MergeRecord], metric: str, mode: Mode, *, title: str | None, every: bool
) -> None:
    """With as many views as the terminal has room for, the best of the newest merge first."""
    from rich.measure import Measurement

    views = [view for view in plots.view_names(records) if any(metric in item.views.get(view, {}) for item in records)]
    # where columns are left out, the best stay; shown in the order of the configuration
    ranked = sorted(views, key=tables.rank(records, metric, mode))
    for number in range(len(views), -1, -1):
        columns = [view for view in views if view in ranked[: max(1, number)]]
        table = tables.merges_table(
            records, metric, mode=mode, title=title, views=views, columns=columns, at_most=None if every else _ROWS
        )
        # measured as if there were room: else it is as wide as it may be
        unbounded = console.options.update(max_width=10_000)
        if number <= 1 or Measurement.get(console, unbounded, table).maximum <= console.width:
            break
    rows, table.caption = table.caption, None
    console.print(table)
    if rows:
        console.print(f"{rows}; --all prints every one.", soft_wrap=True, markup=False)
    if hidden := [printable(view) for view in views if view not in columns]:
        note = f"No room for {', '.join(hidden)}; best vs raw is of all. --html shows them."
        console.print(note, soft_wrap=True, markup=False)


def _page(
    records: dict[Path, list[MergeRecord]], names: dict[Path, str], metric: str, mode: Mode | None, target: Path
) -> str:
    from pretrain_merge.records.disk_use import disk_use
    from pretrain_merge.records.report import page
    from pretrain_merge.records.report_sections import Reported

    shown = [
        Reported(names[run], items, _config(folder_of(run)), disk_use(folder_of(run), target) if run.is_dir() else ())
        for run, items in records.items()
    ]
    return page(shown, metric, mode=mode)


def _config(folder: Path) -> str:
    try:
        return untrusted.read_bytes(folder / _CONFIG, at_most=_LARGEST_CONFIG).decode("utf-8", "replace")
    except (OSError, ValueError):  # of an earlier version, or of a logger
        return ""


def _plain(name: str, records: Sequence[MergeRecord]) -> dict[str, Any]:
    return {"run": name, "records": [json_format.loads(record.to_json()) for record in records]}
