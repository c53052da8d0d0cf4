"""One archive of `torch.save`: a zip of one pickle and of the raw bytes of each storage, in a file or in a part of one.

The pickle is read as plain data, its tensors as places in the file; so nothing is run, and nothing is read until a
piece of it is merged. This module knows zip files and where records lie. It knows no checkpoint.
"""

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline import plain_pickle
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.tensors import Block
from pretrain_merge.offline.torch_objects import NAMES, Storage, StoredTensor, storage_of

_LONGEST_PICKLE = 2**30  # bytes: 100,000 tensors take some 10 MB
_LOCAL_HEADER = 30


class Archive:
    """An opened file.

    Attributes:
        content: The object that was saved, its tensors as `torch_objects` has them.
    """

    def __init__(self, content: Any, path: str, start: int, places: Mapping[str, int]) -> None:
        self.content = content
        self._path, self._start, self._places = path, start, places

    def block(self, tensor: StoredTensor) -> Block:
        """Where the bytes of a tensor of the content are."""
        start = self._start + self._places[tensor.storage.key] + tensor.first
        return Block(self._path, start, (0,) * len(tensor.kind.shape), tensor.kind.shape, tensor.strides)


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
            if "byteorder" in records and _read(window, records["byteorder"]) != b"little":
                raise ValueError("it was written on a big-endian machine")
            pickled = _read(window, records["data.pkl"])
        places: dict[str, int] = {}

        def storage(saved: Any) -> Storage:
            found = storage_of(saved)
            record = records[f"data/{found.key}"]
            # a view of a larger storage is saved with all of it, so they are equal in every honest file
            if found.num_bytes != record.file_size:
                raise ValueError(f"storage {found.key} is said to have {found.num_bytes} bytes")
            if found.key not in places:
                places[found.key] = _data_start(window, record)
            return found

        return Archive(plain_pickle.load(pickled, NAMES, storage), path, start, places)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is not a whole file of torch.save ({error}). Copy it again; a file of before torch 1.6 needs to "
            f"be loaded and saved once more."
        ) from error
    except plain_pickle.NotPlainError as error:
        raise CheckpointError(
            f"{path} is not plain data: {error} Tensors, numbers, text, lists and dicts are read, as with "
            f"weights_only=True. If you trust that class, let it through: --allow {error.path} on the command line, "
            f"torch.serialization.add_safe_globals in Python. Or load the file where you trust it, and save its state "
            f"dict alone."
        ) from error
    except CheckpointError:  # a file that ends too early
        raise
    except Exception as error:  # a crafted file can raise anything
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(f"{path} is not a file that torch.save wrote ({reason}). Copy it again.") from error


def _read(window: "_Window", info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _LONGEST_PICKLE:
        raise ValueError(f"its record {info.filename} has {info.file_size} bytes")
    window.seek(_data_start(window, info))
    return window.read(info.file_size)


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
