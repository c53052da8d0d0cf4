"""Bytes out of files, local or remote, into memory that is there already.

This module knows paths, URLs and positions. A read that comes back short is an error: a file that was cut off is never
padded. Local files are read by position, so that several threads may read one; remote ones go through fsspec.
"""

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError, MissingDependencyError

_MOST_OPEN = 128  # a DCP folder has a file per rank, and a process may have 1024 files open


def is_remote(place: str) -> bool:
    """Whether a place is a URL that fsspec knows (`s3://…`), not a path."""
    return "://" in place


def join(folder: str, name: str) -> str:
    """A file in a folder, local or remote."""
    return f"{folder.rstrip('/')}/{name}"


class Files:
    """Open files of one reader; use as a context manager, which closes them."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            _close(self._open.popitem()[1])

    def read_into(self, file: str, start: int, target: memoryview) -> None:
        """Fill memory with the bytes from a position on.

        Raises:
            CheckpointError: The file cannot be read, or ends before.
        """
        try:
            # by position for local files, so threads do not wait for each other
            done = self._read_remote(file, start, target) if is_remote(file) else self._read(file, start, target)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Copy it again from where it is whole.") from error
        if done < len(target):
            raise CheckpointError(
                f"{file} ends at byte {start + done} and {start + len(target)} are needed. Copy it again from where it "
                f"is whole."
            )

    def read(self, file: str, start: int, num_bytes: int) -> bytes:
        """Some bytes as an object of their own; for headers."""
        target = bytearray(num_bytes)
        self.read_into(file, start, memoryview(target))
        return bytes(target)

    def _read(self, file: str, start: int, target: memoryview) -> int:
        with self._lock:  # an eviction never closes what another thread is reading: it closes the longest unused
            descriptor = self._opened(file, lambda: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        done = 0
        while done < len(target):
            # a call gives at most 2 GiB, and less where a signal comes in
            count = os.preadv(descriptor, [target[done:]], start + done)
            if count == 0:
                break
            done += count
        return done

    def _read_remote(self, file: str, start: int, target: memoryview) -> int:
        with _errors_of_ours(file):
            with self._lock:
                handle, own_lock = self._opened(file, lambda: (_open_remote(file), threading.Lock()))
            with own_lock:  # one position per open file; other files do not wait for this one's network
                return _read_from(handle, start, target)

    def _opened(self, file: str, open_it: Any) -> Any:
        if file not in self._open:
            if len(self._open) >= _MOST_OPEN:
                _close(self._open.popitem(last=False)[1])
            self._open[file] = open_it()
        self._open.move_to_end(file)
        return self._open[file]


def size_of(place: str) -> int | None:
    """Bytes of a file; None where there is none."""
    if not is_remote(place):
        path = Path(place)
        return path.stat().st_size if path.is_file() else None
    with _errors_of_ours(place):
        system, path_there = _url_to_fs(place)
        return int(system.size(path_there)) if system.isfile(path_there) else None


def list_folder(place: str) -> list[str] | None:
    """Names in a folder, sorted; None where it is not a folder."""
    if not is_remote(place):
        return sorted(os.listdir(place)) if Path(place).is_dir() else None
    with _errors_of_ours(place):
        system, path_there = _url_to_fs(place)
        if not system.isdir(path_there):
            return None
        return sorted(str(item).rstrip("/").rpartition("/")[2] for item in system.ls(path_there, detail=False))


def matching(pattern: str) -> list[str]:
    """Files and folders whose names match, sorted; none where it is not a pattern."""
    if not glob.has_magic(pattern):
        return []
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    with _errors_of_ours(pattern):
        system, path_there = _url_to_fs(pattern)
        return sorted(system.unstrip_protocol(item) for item in system.glob(path_there))


def _url_to_fs(place: str) -> tuple[Any, str]:
    import fsspec  # a cloud's library may come with it

    system, path_there = fsspec.core.url_to_fs(place)
    return system, str(path_there)


@contextmanager
def _errors_of_ours(place: str) -> Iterator[None]:
    """A cloud's library raises classes of its own, for instance where it finds no credentials."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{place} needs a library that is not installed: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{place} cannot be read: {type(error).__name__}: {error}. Check the URL and your access to it."
        ) from error


def _open_remote(file: str) -> Any:
    system, path_there = _url_to_fs(file)
    return system.open(path_there, "rb")


def _read_from(handle: Any, start: int, target: memoryview) -> int:
    # most backends read ahead in the open file, which pieces in their order make use of
    handle.seek(start)
    done = 0
    while done < len(target):
        found = handle.read(len(target) - done)
        if not found:
            break
        target[done : done + len(found)] = found
        done += len(found)
    return done


def _close(opened: Any) -> None:
    if isinstance(opened, int):
        os.close(opened)
    else:
        handle, _ = opened
        handle.close()
