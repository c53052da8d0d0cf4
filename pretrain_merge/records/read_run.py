"""Merge points of a run from what its loggers wrote: `merges.jsonl` itself, a CSV, or an offline W&B run.

This module knows three file formats and the names of our metrics. What a logger was not told, it cannot give back: an
export has no learning rates, so a break in it goes unseen, and the distance between snapshots has to be named.
"""

import csv
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError
from pretrain_merge.records import RAW, MergeRecord, Recipe, read_records

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")  # LevelDB's log: checksum, length, which part of a record
_WHOLE, _FIRST, _LAST = 1, 2, 4
Row = Mapping[str, float]


def read_run(path: Path, *, every: int | None = None, average: str = "last", name: str = "merge") -> list[MergeRecord]:
    """The merge points of a run, oldest first.

    Args:
        path: A run's folder, its `merges.jsonl`, a CSV (of Lightning's CSVLogger, or exported from W&B), or a `.wandb`
            file of an offline run. A folder is read by the first of these that it holds.
        every: Steps between snapshots. A CSV and a W&B run do not say.
        average: What a snapshot of such a run is: "last" or "block".
        name: Prefix of the metrics.

    Raises:
        CheckpointError: Nothing of ours is there, or it cannot be read.
        ConfigError: `every` is needed and missing.
    """
    source = _source(path)
    if source.suffix == ".jsonl":
        return read_records(source)
    if every is None:
        raise ConfigError(
            f"every: not given, and {source.name} does not say how far apart the snapshots were. Name the steps of one "
            f"interval (--every 1000), or the run's merges.jsonl, which says."
        )
    rows = _csv_rows(source) if source.suffix == ".csv" else _wandb_rows(source)
    merges = {int(row[f"{name}/step"]): row for row in rows if f"{name}/step" in row and _has_raw(row, name)}
    if not merges:
        raise CheckpointError(f"{source} holds no merge of {name!r}. Name a file that ModelMerging's metrics went to.")
    return [_record(name, row, every, average) for _, row in sorted(merges.items())]


def _source(path: Path) -> Path:
    if path.is_dir():
        for pattern in ("merges.jsonl", "metrics.csv", "**/*.wandb"):
            if found := sorted(path.glob(pattern)):
                return found[-1]
    elif path.is_file() and path.suffix in (".jsonl", ".csv", ".wandb"):
        return path
    raise CheckpointError(
        f"{path} is no run: there is no merges.jsonl, metrics.csv or .wandb file. Name the folder of a run, or one of "
        f"these files."
    )


def _has_raw(row: Row, name: str) -> bool:
    return any(key.startswith(f"{name}/{RAW}/") for key in row)


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                # W&B's own export puts the run's name before the metric
                yield {key.rpartition(" - ")[2]: float(value) for key, value in row.items() if _is_number(value)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Name a CSV of metrics with a header line.") from error


def _is_number(text: object) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False


def _wandb_rows(path: Path) -> Iterator[Row]:
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise MissingDependencyError("W&B runs are read with wandb. Run: pip install wandb") from error
    messages: Any = wandb_internal_pb2  # its classes are made when it is imported
    try:
        for content in _leveldb_records(path.read_bytes()):
            record = messages.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                values = {key: json.loads(value) for key, value in items.items()}
                yield {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error).__module__ != "google.protobuf.message":
            raise
        raise CheckpointError(f"cannot read {path}: {error}. Name the .wandb file of an offline run.") from error


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    position, record = 7, b""  # W&B's own header comes first
    while position + _HEADER.size <= len(data):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _HEADER.size:  # padding
            position += left_in_block
            continue
        _, length, part = _HEADER.unpack_from(data, position)
        body = data[position + _HEADER.size : position + _HEADER.size + length]
        if len(body) < length:  # a run that was killed, or still writes
            return
        record = body if part in (_WHOLE, _FIRST) else record + body
        if part in (_WHOLE, _LAST):
            yield record
        position += _HEADER.size + length


def _record(name: str, row: Row, every: int, average: str) -> MergeRecord:
    measured: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        prefix, _, rest = key.partition("/")
        model, _, metric = rest.partition("/")
        if prefix == name and metric and model != "forecast":
            measured.setdefault(model, {})[metric] = value
    step, window = int(row[f"{name}/step"]), int(row.get(f"{name}/window", 0))
    raw = measured.pop(RAW)
    return MergeRecord(
        name=name,
        step=step,
        samples=0,
        tokens=int(row.get(f"{name}/tokens", 0)),
        window=window,
        spread=row.get(f"{name}/spread", math.nan),
        raw=raw,
        views=measured,
        recipes=dict(_recipes(measured, step, window, every)),
        average=average,
    )


def _recipes(views: Iterable[str], step: int, window: int, every: int) -> Iterator[tuple[str, Recipe]]:
    """Of the plain means; coefficients of other kinds are not in an export."""
    for view in views:
        digits = view.removeprefix("sma")
        number = int(digits) if digits.isdecimal() else window
        if view.startswith("sma") and (digits.isdecimal() or not digits) and number >= 2:
            steps = tuple(step - every * back for back in reversed(range(number)))
            yield view, Recipe(steps, (1 / number,) * number)
