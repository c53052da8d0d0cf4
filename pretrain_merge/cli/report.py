"""The command `pretrain-merge report`: runs to tables, a picture, one page for a browser, and JSON.

This module knows the command's options and where its results go. What they show is `pretrain_merge.records`' business.
"""

import json as json_format
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pretrain_merge.cli.merges_table import print_merges
from pretrain_merge.cli.results import console_beside, write_picture, write_result
from pretrain_merge.cli.run_names import folder_of, run_names
from pretrain_merge.errors import CheckpointError, ConfigError, printable
from pretrain_merge.files import untrusted
from pretrain_merge.records import MergeRecord, metric_names, plots, read_run
from pretrain_merge.records.modes import Mode, mode_of

_ROWS = 40  # a screen, and all merges of a run with the README's lines
_CONFIG, _LARGEST_CONFIG = "merges.config.yaml", 2**16


def report(
    runs: list[Path],
    *,
    metric: str | None = None,
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
        metric: The metric to compare; val_loss is also val/loss. Default: the loss, else what was measured first.
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
    records, left_out = _read(runs, name)
    runs = list(records)
    metric, others = _metric(metric, {names[run]: items for run, items in records.items()})
    for run in runs:
        title = names[run] if len(runs) > 1 else None
        print_merges(
            console, records[run], metric, mode or mode_of(metric), title=title, at_most=None if all else _ROWS,
            all_rows="--all prints every one", all_views="--html run.html shows them",
        )  # fmt: skip
    for reason in left_out:
        console.print(f"Left out: {printable(reason)}", soft_wrap=True, markup=False)
    if others:
        note = f"Shown is {metric}. --metric shows another one: {', '.join(others)}."
        console.print(printable(note), soft_wrap=True, markup=False)
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


def _read(runs: Sequence[Path], name: str) -> tuple[dict[Path, list[MergeRecord]], list[str]]:
    """The records of each run, and why some of several were left out: a pattern also finds those without a merge."""
    records: dict[Path, list[MergeRecord]] = {}
    refused: list[CheckpointError] = []
    for run in runs:
        try:
            records[run] = read_run.read_run(run, name=name, needs_recipes=False)
        except CheckpointError as error:
            refused.append(error)
    if not records:
        raise refused[0]
    return records, list(map(str, refused))


def _metric(wanted: str | None, runs: Mapping[str, Sequence[MergeRecord]]) -> tuple[str, list[str]]:
    """The metric that is shown, as the records call it; and where nobody named it, what else all of them have.

    Raises:
        ConfigError: One of several runs did not measure it.
    """
    measured = {run: dict.fromkeys(key for item in items for key in item.raw) for run, items in runs.items()}
    known = list(dict.fromkeys(key for keys in measured.values() for key in keys))
    common = [key for key in known if all(key in keys for keys in measured.values())]
    # else as it was typed, so that the error names what the user wrote
    shown = (metric_names.to_show(common or known) if wanted is None else metric_names.found(wanted, known)) or wanted
    shown = shown or "val_loss"
    if len(runs) > 1 and shown not in common:
        each = "; ".join(f"{run}: {', '.join(keys) or 'nothing'}" for run, keys in measured.items())
        told = f"--metric takes {' or '.join(common)}" if common else "name those that measured the same"
        raise ConfigError(f"metric: {shown!r} was not measured by all {len(runs)} runs ({each}). Of these {told}.")
    return shown, [key for key in common if key != shown] if wanted is None else []


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
