"""Merge points of a run from what its loggers wrote: `merges.jsonl` itself, a CSV, or an offline W&B run.

This module knows which file of a folder is read, and by what. What metrics say of merges is known to `records.export`.
"""

import csv
import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import parse_interval
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files import untrusted
from pretrain_merge.records import RAW, MergeRecord, export, read_records, wandb_file
from pretrain_merge.records.export import Row
from pretrain_merge.runtime.log import logger

_READ = (".jsonl", ".csv", ".wandb")
_OWN_FILE = "merges.run.json"  # of a run with a callback, also where it has not merged yet
_AFTER_NONE = (
    "Wait for the first, or name another run; where training has ended, its log says why there was none: mostly "
    "`every` was too long for two snapshots, or the learning rate changed between them."
)
_OF_ONE = re.compile(rf"([^/]+)/{RAW}/.+")  # the names of callbacks
_LONGEST_LINE = 2**20  # of a CSV; tens of thousands of columns
_MOST_NAMED = 5  # runs in a message


def read_run(
    path: Path,
    *,
    every: int | str | None = None,
    average: str | None = None,
    name: str = "merge",
    needs_recipes: bool = True,
) -> list[MergeRecord]:
    """The merge points of a run, oldest first.

    Args:
        path: A run's folder, its `merges.jsonl`, a CSV (of Lightning's CSVLogger, or exported from W&B), or a `.wandb`
            file of an offline run. A folder is read by the first of these that it holds; a callback's own, if it has.
        every: Distance between snapshots, as in the configuration of the run, for a file that does not say it; None: as
            a W&B run or the spans of views with a number say.
        average: What a snapshot of such a run is, "last" or "block"; None: as a W&B run says, else "last".
        name: Of the callback: prefix of the metrics, and the folder of its records in that of the run.
        needs_recipes: Whether the records must say which snapshots each view merged; else those of a CSV and of W&B
            may lack it.

    Raises:
        CheckpointError: No merge of ours is there, or it cannot be read.
        ConfigError: `every` is needed and missing, or is not an interval.
    """
    interval = None if every is None else parse_interval(every)
    source = _source(path, name)
    if source.suffix == ".jsonl":
        if not (records := read_records(source)):
            raise CheckpointError(f"{source} holds no merge yet. {_AFTER_NONE}")
        return records
    told: dict[str, Any] = {}
    try:
        merges = export.merges(name, _rows(source, name, told))
        if interval is None and told.get("every") is not None:
            interval = parse_interval(told["every"])
        average = average or ("block" if told.get("average") == "block" else "last")
        records = list(export.records(name, merges, interval, average))
        idle = every is not None and _says_itself(records, export.records(name, merges, None, average))
    except ConfigError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source} is not what a run writes: {error}. Export the run again.") from error
    if not records:
        raise CheckpointError(_why_none(source, name))
    if needs_recipes and export.lacks_recipes(records[-1]):
        raise ConfigError(
            f"every: not given, and {source.name} does not say how far apart the snapshots were. Name the interval as "
            f"the run's configuration has it (--every 1000, --every 1%), or the run's merges.jsonl, which says."
        )
    if idle:
        logger.warning(f"every: {every} is not used, as {source.name} says itself over how many steps its means reach.")
    return records


def _says_itself(records: Iterable[MergeRecord], without: Iterable[MergeRecord]) -> bool:
    """Whether the merges of a file are the same ones without the interval that was named for it."""
    recipes, alone = ([record.recipes for record in items] for items in (records, without))
    return any(recipes) and recipes == alone


def _source(path: Path, name: str) -> Path:
    """The file that a run is read from.

    Raises:
        CheckpointError: There is none, or several; says where.
    """
    if path.is_file() and path.suffix in _READ:
        return path
    if not path.is_dir():
        is_there = "is a file of another kind" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {is_there}. Name the folder of a run, its merges.jsonl, a .csv of its metrics (unpacked), or the "
            f".wandb file of an offline run."
        )
    # a callback of another name than `merge` has a folder of its own in that of the run
    for pattern in (f"{glob.escape(name)}/merges.jsonl", "merges.jsonl", "metrics.csv", "*.wandb"):
        if found := sorted(path.glob(pattern)):
            return found[-1]
    # a folder of `lightning_logs`, or of `wandb`; not deeper, where a folder may hold all the world
    below = [item.parent for depth in (1, 2, 3) for item in sorted(path.glob(f"{'*/' * depth}merges.jsonl"))]
    if not below:
        found = [item for depth in (1, 2) for item in sorted(path.glob(f"{'*/' * depth}*.wandb"))]
        below = [item for item in found if not item.parent.is_symlink()]  # W&B's `latest-run` is one of the others
    # of several runs none is guessed
    if len(below) == 1 and below[0].suffix == ".wandb":
        return below[0]
    if not below and (path / _OWN_FILE).exists():
        raise CheckpointError(f"{path} is of a run that has not merged. {_AFTER_NONE}")
    named = ", ".join(map(str, below[-_MOST_NAMED:]))
    raise CheckpointError(
        f"{path} is not a run: there is no merges.jsonl, metrics.csv or .wandb file. "
        + (f"Runs in it: {named}. Name one of these." if below else "Name the folder of a run, or one of these files.")
    )


def _why_none(source: Path, name: str) -> str:
    """Why a file holds no merge, and what to name instead."""
    keys = {key for row in _rows(source, name, {}) for key in row}
    others = sorted({match[1] for key in keys if (match := _OF_ONE.fullmatch(key)) and f"{match[1]}/step" in keys})
    if others:
        return f"{source} holds no merge of {name!r}, and some of {', '.join(others)}. Add --name {others[0]}."
    if (source.parent / _OWN_FILE).exists():
        return f"{source.parent} is of a run that has not merged. {_AFTER_NONE}"
    return f"{source} holds no merge of {name!r}. Name a file that ModelMerging's metrics went to."


def _rows(source: Path, name: str, told: dict[str, Any]) -> Iterator[Row]:
    """Rows of metrics; `told` is given what else the file says of the callback's configuration."""
    return _csv_rows(source) if source.suffix == ".csv" else _wandb_rows(source, name, told)


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        for row in csv.DictReader(line.decode("utf-8") for line in untrusted.lines(path, longest=_LONGEST_LINE)):
            # W&B's own export puts the run's name before the metric
            numbers = {key.rpartition(" - ")[2]: _number(value) for key, value in row.items() if key is not None}
            yield {key: value for key, value in numbers.items() if value is not None}
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Name a CSV of metrics with a header line.") from error


def _wandb_rows(path: Path, name: str, told: dict[str, Any]) -> Iterator[Row]:
    for kind, items in wandb_file.items(path):
        if kind == "history":
            numbers = {key: _number(value) for key, value in items.items()}
            yield {key: value for key, value in numbers.items() if value is not None}
        elif (config := items.get(f"{name}/config")) is not None:
            try:
                found = untrusted.parse_json(config.encode())
            except ValueError as error:
                raise CheckpointError(f"{path} is damaged: {error}. Name another file of the run.") from error
            told.update(found if isinstance(found, dict) else {})


def _number(text: object) -> float | None:
    try:
        # W&B has no word for what is not finite, and writes a text
        return float(text.strip('"')) if isinstance(text, str) else None
    except ValueError:
        return None
