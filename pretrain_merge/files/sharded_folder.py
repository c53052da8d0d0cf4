"""Snapshots of sharded models as durable folders: written by W ranks, read by any other number of them.

This module knows torch.distributed.checkpoint and its safetensors storage. Every rank must call its functions at the
same point. What a folder must hold is listed in it, and the checksum of that list is part of the folder's name.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pretrain_merge.errors import CheckpointError, RankError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.files.atomic import sync
from pretrain_merge.files.snapshot_file import SnapshotFile, is_ours
from pretrain_merge.runtime import ranks

SUFFIX = ".sharded"
_PARTS = "parts.json"
_BLOCK = 2**24  # bytes that a checksum reads at once
# a disk's error comes as itself, wrapped by torch.distributed.checkpoint, or by safetensors
_FAILURES = (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException)
_T = TypeVar("_T")
_Part = tuple[str, int, int]  # name, bytes, checksum


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> SnapshotFile:
    """Write a folder under a temporary name, flush it to the disk, and give it its name.

    Args:
        folder: Where it goes; one that all ranks see.
        stem: What it is and its step, as in `snapshot-00001000`.
        tensors: By name; shards as DTensors.

    Raises:
        CheckpointError: The disk refuses, on this rank or on another.
    """
    temporary = folder / f".{stem}.tmp"
    if ranks.rank() == 0:
        _together(f"write {temporary}", lambda: _make_empty(temporary))
    else:
        _together(f"write {temporary}", lambda: None)  # the others wait for the folder, and learn if there is none
    parts = _together(f"write {temporary}", lambda: _write_parts(temporary, tensors))
    listed = sorted(part for of_rank in ranks.gather(parts) for part in of_rank)
    text = json.dumps(listed, indent=0).encode()
    entry = SnapshotFile(f"{stem}-{zlib.crc32(text):08x}{SUFFIX}", len(text), zlib.crc32(text))
    publish = (lambda: _publish(temporary, folder / entry.name, text)) if ranks.rank() == 0 else (lambda: None)
    _together(f"write {folder / entry.name}", publish)
    return entry


def read(folder: Path, file: SnapshotFile, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from a folder.

    Args:
        folder: Where it lies.
        file: What it must be.
        tensors: By name, in the shapes and dtypes that the folder must hold; shards as DTensors.

    Raises:
        CheckpointError: It is not there, or is not what was written, or belongs to another model.
    """
    path = folder / file.name
    _together(f"use {path}", lambda: _check(path, file))
    reader = HuggingFaceStorageReader(str(path))
    _together(f"use {path}", lambda: _refuse_other_model(reader, tensors))
    _together(f"use {path}", lambda: load(dict(tensors), storage_reader=reader))


def _together(what: str, do: Callable[[], _T]) -> _T:
    """Do a thing on every rank, or raise on every rank."""
    try:
        with ranks.all_or_none(what):
            return do()
    except RankError as error:
        raise CheckpointError(str(error)) from error
    except _FAILURES as error:
        raise CheckpointError(f"cannot {what}: {' '.join(str(error).split())}") from error


def _make_empty(folder: Path) -> None:
    atomic.make_folder(folder.parent)
    atomic.delete(folder)
    folder.mkdir()


def _write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> list[_Part]:
    save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    own = sorted(folder.glob(f"shard-{ranks.rank() + 1:05d}-*.safetensors"))
    for path in own:
        sync(path)
    return [(path.name, path.stat().st_size, _checksum(path)) for path in own]


def _publish(temporary: Path, target: Path, text: bytes) -> None:
    atomic.write(temporary / _PARTS, text)
    atomic.delete(target)  # the same bytes by its name, or damaged ones
    # last: a folder of this name is whole, also after a power cut
    temporary.rename(target)
    sync(target.parent)


def _check(path: Path, file: SnapshotFile) -> None:
    # a link could lead out of the folder
    if not is_ours(file.name) or path.is_symlink() or not path.is_dir():
        raise ValueError("it is not a folder of a snapshot.")
    text = untrusted.read_bytes(path / _PARTS, is_ours=True)
    if (len(text), zlib.crc32(text)) != (file.num_bytes, file.crc32):
        raise ValueError(f"{_PARTS} is damaged. Copy the folder again from where it is whole.")
    parts: list[_Part] = untrusted.parse_json(text)
    if not _are_parts(parts) or {name for name, _, _ in parts} != {item.name for item in path.iterdir()} - {_PARTS}:
        raise ValueError(f"it does not hold the files of {_PARTS}. Copy the folder again from where it is whole.")
    # each rank reads its share, so that all are read once
    for name, num_bytes, checksum in parts[ranks.rank() :: ranks.num_ranks()]:
        part = path / name
        if part.lstat().st_size != num_bytes or _checksum(part) != checksum:
            raise ValueError(f"{name} is damaged. Copy the folder again from where it is whole.")


def _are_parts(parts: object) -> bool:
    return isinstance(parts, list) and all(
        isinstance(part, list) and len(part) == 3 and all(map(isinstance, part, (str, int, int))) for part in parts
    )


def _checksum(path: Path) -> int:
    checksum = 0
    with untrusted.opened(path, is_ours=True) as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _refuse_other_model(reader: HuggingFaceStorageReader, tensors: Mapping[str, Tensor]) -> None:
    found = {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != wanted:
        other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(
            f"it is of another model: {other[0]} is {found.get(other[0], 'missing')} there and "
            f"{wanted.get(other[0], 'missing')} here. Build the model with the shapes and dtypes it was trained with."
        )
