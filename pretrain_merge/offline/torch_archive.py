"""One archive of `torch.save`: a zip of one pickle and of the raw bytes of each storage, in a file or in a part of one.

The pickle goes through torch's own unpickler for `weights_only=True`, with storages that have a size and a place and no
memory; so nothing is run, and nothing is read until a piece of it is merged. This module knows zip files and storages.
It knows no checkpoint.
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
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.tensors import Block

_LONGEST_PICKLE = 2**30  # bytes: 100,000 tensors take some 10 MB
_LOCAL_HEADER = 30


@dataclass(frozen=True)
class Archive:
    """An opened file.

    Attributes:
        content: The object that was saved; tensors have no memory.
        blocks: Where the bytes of a tensor of `content` are, by `id`.
    """

    content: Any
    blocks: Mapping[int, Block]


def open_archive(path: str, files: Files, start: int, length: int) -> Archive:
    """What `torch.save` wrote into a part of a file.

    Raises:
        CheckpointError: It is damaged, or more than plain data.
    """
    window = _Window(files, path, start, length)
    try:
        with zipfile.ZipFile(window) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            # readers differ in which of the two they take
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


def _unpickled(pickled: bytes, records: Mapping[str, zipfile.ZipInfo], storages: dict[str, Any]) -> Any:
    def storage_of(saved: Any) -> Any:
        kind, storage_type, key, _, num_elements = saved
        if (kind if isinstance(kind, str) else kind.decode()) != "storage":
            raise ValueError(f"it refers to {kind!r}")
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        num_bytes = num_elements * dtype.itemsize
        # a view of a larger storage is saved with all of it, so they are equal in every honest file
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
    # no recursion: a crafted pickle nests a million lists
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
    # torch never compresses, and what is compressed has no place of its own
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
