"""What `torch.save` wrote: Lightning's `.ckpt`, `.pt` and `.bin` files, and the tensors inside DCP's files.

Such a file is a zip archive of one pickle and of the raw bytes of each storage. The pickle goes through torch's own
unpickler for `weights_only=True`, with storages that have a size and a place and no memory; so nothing is run, and
nothing is read until a piece of it is merged.
"""

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler  # what `torch.load(weights_only=True)` unpickles with

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.tensors import Block, Kind, Source

_LONGEST_PICKLE = 2**30
_LOCAL_HEADER = 30
_LARGEST_RATE = 1e9
# where a file that is not one flat state dict keeps the model; the first that is there is taken
_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class Archive:
    """An opened file.

    Attributes:
        content: The object that was saved; tensors have no memory.
        blocks: Where the bytes of a tensor of `content` are, by `id`.
    """

    content: Any
    blocks: Mapping[int, Block]


def open_file(path: str) -> Source:
    """A `.ckpt`, `.pt` or `.bin` file as a checkpoint.

    Raises:
        CheckpointError: It cannot be read as plain data, or holds no state dict.
    """
    size = size_of(path)
    if size is None:
        raise CheckpointError(f"{path} is missing. Name a file that is there.")
    with Files() as files:
        archive = open_archive(path, files, 0, size)
    content = archive.content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}. A state dict, or a dict with one, is needed.")
    tensors, ties, places = _named(_state_dict(path, content), archive)
    states, _, places_of_states = _named(dict(optimizer_tensors(content)), archive)
    step = content.get("global_step")
    is_lightning = "pytorch-lightning_version" in content
    return Source(
        path,
        "lightning" if is_lightning else "torch",
        tensors,
        lambda name: [(places | places_of_states)[name]],
        (path,),
        ties=ties,
        step=step if type(step) is int else None,
        lr=learning_rates(content) if is_lightning else (),
        optimizer=states if is_lightning else {},
    )


def open_archive(path: str, files: Files, start: int, length: int) -> Archive:
    """What `torch.save` wrote into a part of a file.

    Raises:
        CheckpointError: It is damaged, or more than plain data.
    """
    window = _Window(files, path, start, length)
    try:
        with zipfile.ZipFile(window) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise ValueError("it has a record twice")
            if records["data.pkl"].file_size > _LONGEST_PICKLE:
                raise ValueError(f"its pickle has {records['data.pkl'].file_size} bytes")
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise ValueError("it was written on a big-endian machine")
            pickled = archive.read(records["data.pkl"])
        storages: dict[str, Any] = {}
        content = _unpickled(pickled, records, storages)
        places = {
            storage._untyped_storage._cdata: (
                _data_start(window, records[f"data/{key}"]),
                records[f"data/{key}"].file_size,
            )
            for key, storage in storages.items()
        }
        return Archive(content, {id(item): _block(path, start, item, places) for item in _tensors_in(content)})
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is not a whole file of torch.save ({error}). Copy it again; a file of before torch 1.6 needs to "
            f"be loaded and saved once more."
        ) from error
    except Exception as error:  # torch's unpickler raises whatever a crafted file makes it raise
        raise CheckpointError(
            f"{path} is not plain data: {_first_line(error)} Only tensors, numbers, text, lists and dicts are read, as "
            f"with weights_only=True. Load it where you trust it and save its state dict alone, or allow that class "
            f"with torch.serialization.add_safe_globals."
        ) from error


def optimizer_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a Lightning checkpoint's optimizer states, by where they belong."""
    found: dict[str, Tensor] = {}
    for number, optimizer in enumerate(_dicts(content, "optimizer_states")):
        state = optimizer.get("state")
        for key, values in state.items() if isinstance(state, dict) else ():
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, Tensor):
                    found[f"optimizer_states/{number}/{key}/{name}"] = value
    return found


def learning_rates(content: Mapping[str, Any]) -> tuple[float, ...]:
    """Of a Lightning checkpoint: those of its optimizers, else those that its schedulers set last."""
    groups = [group for state in _dicts(content, "optimizer_states") for group in _dicts(state, "param_groups")]
    found: list[Any] = [group.get("lr") for group in groups]
    if not found:  # sharded checkpoints keep the states of optimizers elsewhere
        found = [rate for state in _dicts(content, "lr_schedulers") for rate in _listed(state.get("_last_lr"))]
    # a rate that is a tensor has no value here
    are_rates = all(type(rate) in (int, float) and abs(rate) < _LARGEST_RATE for rate in found)
    return tuple(map(float, found)) if are_rates else ()


def _dicts(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [item for item in _listed(content.get(key)) if isinstance(item, dict)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []  # a crafted file has anything there


def _state_dict(path: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in _MODEL_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _tensors_of(inner)
    found = _tensors_of(content)
    if not found:
        raise CheckpointError(
            f"{path} holds no state dict: its keys are {', '.join(map(str, list(content)[:8])) or 'none'}. Allowed: "
            f"names and tensors, or these under one of {', '.join(_MODEL_KEYS)}. Save the state dict alone."
        )
    return found


def _tensors_of(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}


def _named(tensors: Mapping[str, Tensor], archive: Archive) -> tuple[dict[str, Kind], dict[str, str], dict[str, Block]]:
    """Kinds, other names of tied tensors, and places."""
    kinds: dict[str, Kind] = {}
    ties: dict[str, str] = {}
    places: dict[str, Block] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in archive.blocks:
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__} of layout {tensor.layout}. Dense tensors can be merged: leave it "
                f"out of the state dict, or make it dense."
            )
        block = archive.blocks[id(tensor)]
        identity = (block.start, block.shape, block.strides, tensor.dtype) if tensor.numel() else name
        if first.setdefault(identity, name) != name:
            ties[name] = first[identity]
            continue
        kinds[name], places[name] = Kind(tuple(tensor.shape), tensor.dtype), block
    return kinds, ties, places


def _unpickled(pickled: bytes, records: Mapping[str, zipfile.ZipInfo], storages: dict[str, Any]) -> Any:
    def storage_of(saved: Any) -> Any:
        kind, storage_type, key, _, num_elements = saved
        if (kind if isinstance(kind, str) else kind.decode()) != "storage":
            raise ValueError(f"it refers to {kind!r}")
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        num_bytes = num_elements * dtype.itemsize
        if num_bytes != records[f"data/{key}"].file_size:
            raise ValueError(f"storage {key} is said to have {num_bytes} bytes")
        if key not in storages:
            untyped = torch.UntypedStorage(num_bytes, device="meta")  # type: ignore[no-untyped-call]
            storages[key] = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=untyped, dtype=dtype, _internal=True
            )
        return storages[key]

    unpickler: Any = Unpickler(io.BytesIO(pickled), encoding="utf-8")
    unpickler.persistent_load = storage_of
    return unpickler.load()


def _tensors_in(content: Any) -> list[Tensor]:
    found, waiting, seen = [], [content], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:  # a crafted one may hold itself
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            waiting.extend(item)
    return [tensor for tensor in found if tensor.is_meta and tensor.layout is torch.strided]


def _block(path: str, start: int, tensor: Tensor, places: Mapping[int, tuple[int, int]]) -> Block:
    # not the storage's own size: torch lets it grow where a tensor is said to be larger
    place, num_bytes = places[tensor.untyped_storage()._cdata] if tensor.numel() else (0, 0)
    first = tensor.storage_offset() * tensor.itemsize
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and not 0 <= first + reach * tensor.itemsize < num_bytes:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} reaches beyond its storage")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Block(path, start + place + int(first), (0,) * tensor.dim(), tuple(tensor.shape), strides)


def _data_start(window: "_Window", info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its local header, whose length the directory does not say."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"its record {info.filename} is compressed or encrypted")
    window.seek(info.header_offset)
    fields = struct.unpack("<4s22xHH", window.read(_LOCAL_HEADER))
    start = info.header_offset + _LOCAL_HEADER + int(fields[1]) + int(fields[2])
    if fields[0] != b"PK\x03\x04" or start + info.file_size > window.length:
        raise ValueError(f"its record {info.filename} lies elsewhere than its directory says")
    return start


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # torch's message goes on with advice that would run the file
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return text.partition(" Please use")[0].partition(". Please")[0].rstrip(".")[:300] + "."


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, files: Files, path: str, start: int, length: int) -> None:
        self.length = length
        self._files, self._path, self._start, self._at = files, path, start, 0

    def readable(self) -> bool:
        """As a file that is read."""
        return True

    def seekable(self) -> bool:
        """Anywhere."""
        return True

    def tell(self) -> int:
        """The position in the part."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As `io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("it refers to bytes before its beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As `io.RawIOBase.read`, never beyond the part."""
        rest = max(0, self.length - self._at)
        count = rest if size < 0 else min(size, rest)
        found = self._files.read(self._path, self._start + self._at, count)
        self._at += count
        return found
