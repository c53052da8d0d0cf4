"""Merge points of a run from what its loggers wrote: `merges.jsonl` itself, a CSV, or an offline W&B run.

This module knows three file formats and the names of our metrics. What a logger was not told, it cannot give back: an
export has no learning rates, so a break in it goes unseen, and the distance between snapshots has to be named.
"""

import csv
import glob
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError
from pretrain_merge.files import untrusted
from pretrain_merge.records import (
    AT_END,
    FORECAST,
    GAP_CLOSED,
    RAW,
    SPAN,
    Expected,
    MergeRecord,
    Recipe,
    read_records,
)

_NESTED = re.compile(r"sma[0-9]*|further-.*")
_BLOCK, _HEADER = 32768, struct.Struct("<IHB")  # LevelDB's log: checksum, length, which part of a record
_WHOLE, _FIRST, _LAST = 1, 2, 4  # 3: in the middle
_SIGNATURE = 7  # bytes
_LARGEST_RECORD = 2**24  # bytes; one of ours has some kilobytes
_LARGEST_WINDOW = 10_000  # as in `config`; a file may claim any number of snapshots
_MOST_DIGITS = 9
_MOST_SNAPSHOTS = 100_000  # of all views of a merge together: ten over the largest window
_MOST_OF_ALL = 4_000_000  # of all merges together; each takes some 40 bytes
_LONGEST_LINE = 2**20  # of a CSV; tens of thousands of columns
_LARGEST_STEP = 2**53  # beyond, floats skip integers
_MOST_NAMED = 5  # runs in a message
Row = Mapping[str, float]


def read_run(
    path: Path,
    *,
    every: int | None = None,
    average: str = "last",
    name: str = "merge",
    needs_recipes: bool = True,
) -> list[MergeRecord]:
    """The merge points of a run, oldest first.

    Args:
        path: A run's folder, its `merges.jsonl`, a CSV (of Lightning's CSVLogger, or exported from W&B), or a `.wandb`
            file of an offline run. A folder is read by the first of these that it holds; a callback's own, if it has.
        every: Steps between snapshots. A CSV and a W&B run do not say.
        average: What a snapshot of such a run is: "last" or "block".
        name: Of the callback: prefix of the metrics, and the folder of its records in that of the run.
        needs_recipes: Whether the records must say which snapshots each view merged; else those of a CSV and of W&B
            may lack it.

    Raises:
        CheckpointError: No merge of ours is there, or it cannot be read.
        ConfigError: `every` is needed and missing.
    """
    source = _source(path, name)
    if source.suffix == ".jsonl":
        if not (records := read_records(source)):
            raise CheckpointError(f"{source} holds no merge yet. Wait for the first, or name another run.")
        return records
    if every is None and needs_recipes:
        raise ConfigError(
            f"every: not given, and {source.name} does not say how far apart the snapshots were. Name the steps of one "
            f"interval (--every 1000; of a share as 1%, what it came to at the end), or the run's merges.jsonl, which "
            f"says."
        )
    if every is not None and every < 1:
        raise ConfigError(f"every: {every} is not a number of steps. Allowed: whole numbers from 1 on.")
    rows = _csv_rows(source) if source.suffix == ".csv" else _wandb_rows(source)
    try:
        merges: dict[int, Row] = {}
        for row in rows:
            if f"{name}/step" in row:  # numbers of a published model come later, at the step of its merge
                step = _counter(row, f"{name}/step", _LARGEST_STEP)
                merges[step] = {**merges.get(step, {}), **row}
        records = list(
            _records(name, [row for _, row in sorted(merges.items()) if _is_merge(row, name)], every, average)
        )
    except ValueError as error:
        raise CheckpointError(f"{source} is not what a run writes: {error}. Export the run again.") from error
    if not records:
        raise CheckpointError(f"{source} holds no merge of {name!r}. Name a file that ModelMerging's metrics went to.")
    return records


def _source(path: Path, name: str) -> Path:
    if path.is_dir():
        # a callback of another name than `merge` has a folder of its own in that of the run
        for pattern in (f"{glob.escape(name)}/merges.jsonl", "merges.jsonl", "metrics.csv", "**/*.wandb"):
            if found := sorted(path.glob(pattern)):
                return found[-1]
    elif path.is_file() and path.suffix in (".jsonl", ".csv", ".wandb"):
        return path
    # `lightning_logs` for `lightning_logs/version_0`; not deeper, where a folder may hold all the world
    below = sorted({*path.glob("*/merges.jsonl"), *path.glob("*/*/merges.jsonl")}) if path.is_dir() else []
    runs = ", ".join(str(found.parent) for found in below[-_MOST_NAMED:])
    raise CheckpointError(
        f"{path} is not a run: there is no merges.jsonl, metrics.csv or .wandb file. "
        + (f"Runs in it: {runs}. Name one of these." if runs else "Name the folder of a run, or one of these files.")
    )


def _is_merge(row: Row, name: str) -> bool:
    return any(key.startswith(f"{name}/{RAW}/") for key in row)


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        for row in csv.DictReader(line.decode("utf-8") for line in untrusted.lines(path, longest=_LONGEST_LINE)):
            # W&B's own export puts the run's name before the metric
            numbers = {key.rpartition(" - ")[2]: _number(value) for key, value in row.items() if key is not None}
            yield {key: value for key, value in numbers.items() if value is not None and math.isfinite(value)}
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Name a CSV of metrics with a header line.") from error


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _wandb_rows(path: Path) -> Iterator[Row]:
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise MissingDependencyError("W&B runs are read with wandb. Run: pip install wandb") from error
    messages: Any = wandb_internal_pb2  # its classes are made when it is imported
    try:
        with untrusted.opened(path) as file:
            for content in _leveldb_records(file):
                record = messages.Record.FromString(content)
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    numbers = {key: _number(value) for key, value in items.items()}
                    yield {key: value for key, value in numbers.items() if value is not None}
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error).__module__ != "google.protobuf.message":
            raise
        raise CheckpointError(f"cannot read {path}: {error}. Name the .wandb file of an offline run.") from error


def _leveldb_records(file: BinaryIO) -> Iterator[bytes]:
    position, record = _SIGNATURE, bytearray()  # W&B's own header comes first
    file.seek(position)
    while True:
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _HEADER.size:  # padding
            position += left_in_block
            file.seek(position)
            continue
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return
        _, length, part = _HEADER.unpack(head)
        body = file.read(length)
        if len(body) < length:  # a run that was killed, or still writes
            return
        if not _WHOLE <= part <= _LAST:  # the room of a file that was never written
            return
        if part in (_WHOLE, _FIRST):
            record.clear()
        if len(record) + length > _LARGEST_RECORD:
            raise ValueError(f"a record has more than {_LARGEST_RECORD:,} bytes")
        record += body
        if part in (_WHOLE, _LAST):
            yield bytes(record)
        position += _HEADER.size + length


def _records(name: str, rows: Iterable[Row], every: int | None, average: str) -> Iterator[MergeRecord]:
    num_snapshots = 0
    for row in rows:
        record = _record(name, row, every, average)
        num_snapshots += sum(len(recipe.steps) for recipe in record.recipes.values())
        if num_snapshots > _MOST_OF_ALL:
            raise ValueError(f"its merges are of more than {_MOST_OF_ALL:,} snapshots together")
        yield record


def _record(name: str, row: Row, every: int | None, average: str) -> MergeRecord:
    measured: dict[str, dict[str, float]] = {}
    forecasts: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        prefix, _, rest = key.partition("/")
        model, _, metric = rest.partition("/")
        if prefix != name or not metric or metric.startswith(f"{GAP_CLOSED}/"):
            continue
        if model == FORECAST:
            forecast, _, metric = metric.partition("/")
            if _NESTED.fullmatch(forecast):  # a mean that forecasts read, beside the forecasts
                measured.setdefault(f"{FORECAST}/{forecast}", {})[metric] = value
            elif not metric.startswith(f"{AT_END}/"):  # of a forecast that was made before
                forecasts.setdefault(forecast, {})[metric] = value
        else:
            measured.setdefault(model, {})[metric] = value
    step = _counter(row, f"{name}/step", _LARGEST_STEP)
    window = _counter(row, f"{name}/window", _LARGEST_WINDOW)
    raw = measured.pop(RAW)
    spans = {view: _counter(values, SPAN, _LARGEST_STEP) for view, values in measured.items() if SPAN in values}
    for values in measured.values():
        for told_of_recipes in (SPAN, "best_span", "best_step", "regret"):
            values.pop(told_of_recipes, None)
    numbers = _numbers(measured, window, spans, every, average) if every is not None else ()
    return MergeRecord(
        name=name,
        step=step,
        samples=0,
        tokens=_counter(row, f"{name}/tokens", _LARGEST_STEP),
        window=window,
        spread=row.get(f"{name}/spread", math.nan),
        raw=raw,
        views=measured,
        recipes=dict(_recipes(numbers, step, average)),
        forecasts={key: _expected(values, step) for key, values in forecasts.items()},
        average=average,
    )


def _expected(values: Row, step: int) -> dict[str, Expected]:
    """A forecast by its metric; a run of an earlier version did not say where its anneal ends."""
    end = _counter({"step": step, **values}, "step", _LARGEST_STEP)
    return {
        metric: Expected(mean, values[f"{metric}/low"], values[f"{metric}/high"], end)
        for metric, mean in values.items()
        if {f"{metric}/low", f"{metric}/high"} <= values.keys()
    }


def _counter(row: Row, key: str, most: int) -> int:
    value = row.get(key, 0.0)
    if not 0 <= value <= most:
        raise ValueError(f"{key} is {value:g}, and may be 0 to {most}")
    return int(value)


def _numbers(
    views: Iterable[str], window: int, spans: Mapping[str, int], every: int, average: str
) -> Iterator[tuple[str, int, int]]:
    """How many snapshots each plain mean holds and what it spans; coefficients of other kinds are not in an export."""
    for view in views:
        kind = view.removeprefix(f"{FORECAST}/")
        digits = kind.removeprefix("sma")
        if not kind.startswith("sma") or (digits and not (digits.isdecimal() and len(digits) <= _MOST_DIGITS)):
            continue
        if view in spans:  # older exports do not say it
            yield view, round(spans[view] / every) + (average == "last"), spans[view]
        else:
            number = int(digits or window)
            yield view, number, every * (number - (average == "last"))


def _recipes(numbers: Iterable[tuple[str, int, int]], step: int, average: str) -> Iterator[tuple[str, Recipe]]:
    num_snapshots = 0
    for view, number, span in numbers:
        if number > _LARGEST_WINDOW:
            raise ValueError(f"view {view!r} merges {number} snapshots, and a window holds at most {_LARGEST_WINDOW}")
        num_snapshots += number
        if num_snapshots > _MOST_SNAPSHOTS:
            raise ValueError(f"the views at step {step} merge more than {_MOST_SNAPSHOTS:,} snapshots together")
        if number >= 2:
            # as far apart as the span says: intervals that grow with the run are no multiples of one number
            parts = number - (average == "last")  # blocks fill one interval each
            steps = tuple(step - round(span * back / parts) for back in reversed(range(number)))
            yield view, Recipe(steps, (1 / number,) * number)
