"""The one way in which this package writes: whole under its name or not at all, and never through a link.

This module knows files, folders and renames; it knows nothing of what is in them. What it raises is an `OSError`, to
which the caller adds what its user can do. A run's folder may be one that others write to, so a name of ours that is a
link, or something else than a file, is refused and never followed.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT
_LONGEST = 200  # bytes of a name inside of a temporary one; file systems take 255
# Flushes that wait together share a commit of the file system: 1,000 small files take a tenth of the time.
_NUM_FLUSHES = 8
_MOST_PENDING = 2**28  # bytes of a batch that may be on their way to the disk


class Draft:
    """A file under a temporary name.

    Attributes:
        file: Open for writing and reading.
        path: Where it is until it is complete.
        target: The name that it takes then; may be set as long as it is a draft, as to a name with its checksum.
    """

    def __init__(self, file: BinaryIO, path: Path, target: Path) -> None:
        self.file = file
        self.path = path
        self.target = target


class Batch:
    """Files that are flushed together and named afterwards: many small ones do not wait for the disk one by one.

    Large ones are not held back: a batch of some hundred megabytes is finished, and the next one begins.
    """

    def __init__(self) -> None:
        self._drafts: list[tuple[Path, Path]] = []  # where each is, and its name
        self._folders: set[Path] = set()
        self._num_bytes = 0

    def add(self, path: Path, target: Path, *, num_bytes: int = 0) -> None:
        """A file that is written and not flushed.

        Raises:
            OSError: The disk refuses this file or one before.
        """
        self._drafts.append((path, target))
        self._num_bytes += num_bytes
        if self._num_bytes > _MOST_PENDING:
            self.finish()

    def flush_later(self, folder: Path) -> None:
        """A folder in which something else was given its name."""
        self._folders.add(folder)

    def finish(self) -> None:
        """Flush all contents, give all names, and flush the folders: each once.

        Raises:
            OSError: The disk refuses. What has its name already is complete.
        """
        with ThreadPoolExecutor(_NUM_FLUSHES, thread_name_prefix="pretrain-merge-flush") as flushes:
            for _ in flushes.map(sync, [path for path, _ in self._drafts]):
                pass  # raises what it met
        while self._drafts:
            path, target = self._drafts[0]
            publish(path, target, outlives_run=False)
            self._folders.add(target.parent)
            # one by one, so that `discard` deletes what has no name yet and nothing else
            del self._drafts[0]
        # names last: one that is on the disk must not stand for contents that are not
        for folder in self._folders:
            sync(folder)
        self._folders.clear()
        self._num_bytes = 0

    def discard(self) -> None:
        """Delete what has not got its name."""
        for path, _ in self._drafts:
            delete(path)
        self._drafts.clear()


@contextmanager
def batch() -> Iterator[Batch]:
    """Files that are complete, and on the disk, when the block ends without an error."""
    files = Batch()
    try:
        yield files
        files.finish()
    finally:
        files.discard()


@contextmanager
def draft(target: Path, *, outlives_run: bool = True, batch: Batch | None = None) -> Iterator[Draft]:
    """A new file beside `target`, which takes that name when the block ends, after everything is on the disk.

    Args:
        target: Where the file shall be, in a folder that exists. A file that is there is replaced at once.
        outlives_run: Whether its name, too, must survive a loss of power.
        batch: Flushes the file and gives it its name together with others.

    Raises:
        OSError: The disk refuses, or the target is a link or something else than a file. No draft is left.
    """
    if not target.name:  # `.` and `/`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    path = temporary_beside(target)
    # exclusive: nothing that lies there already, such as a link to something that lives, is opened; its mode is the
    # user's umask
    descriptor = os.open(path, _FLAGS | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        with os.fdopen(descriptor, "wb+") as file:
            item = Draft(file, path, target)
            yield item
            file.flush()
            if batch is None:
                os.fsync(file.fileno())
            else:
                batch.add(path, item.target, num_bytes=os.fstat(file.fileno()).st_size)
        if batch is None:
            publish(path, item.target, outlives_run=outlives_run)
    except BaseException:
        with suppress(OSError):
            # an error of the deletion would hide the one that matters
            path.unlink(missing_ok=True)
        raise


def write(target: Path, content: bytes | str) -> None:
    """Write a whole file, as `draft`.

    Raises:
        OSError: As `draft`.
    """
    with draft(target) as item:
        item.file.write(content.encode() if isinstance(content, str) else content)


def append(path: Path, text: str, *, outlives_run: bool = False) -> None:
    """Add text to a file, which is made where needed. It survives this process.

    Args:
        path: The file.
        text: One piece, which is written at once.
        outlives_run: Whether it must survive a loss of power, too.

    Raises:
        OSError: The disk refuses, or the file is a link or something else than a file.
    """
    # O_NONBLOCK: without it, a pipe would wait for somebody to read it
    descriptor = os.open(path, _FLAGS | os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK, 0o666)
    with os.fdopen(descriptor, "ab") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a file")
        is_new = os.fstat(descriptor).st_size == 0
        file.write(text.encode())
        file.flush()
        if outlives_run:
            os.fsync(descriptor)
    if outlives_run and is_new:
        sync(path.parent)


def publish(temporary: Path, target: Path, *, outlives_run: bool = True) -> None:
    """Give a file that is complete its name.

    Raises:
        OSError: The disk refuses, or a link or something else than a file has the name.
    """
    with suppress(FileNotFoundError):
        # between this look and the rename a link may come; the rename replaces it and follows none
        mode = target.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{target} is {'a link' if stat.S_ISLNK(mode) else 'not a file'}. Move it away")
    temporary.replace(target)
    if outlives_run:
        sync(target.parent)


def make_folder(folder: Path) -> None:
    """A folder of ours, and those above it, where it is not there yet.

    Raises:
        OSError: The disk refuses, or it is a link: what lies elsewhere is not ours to fill and to clean up.
    """
    refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)


def named_by_user(folder: str | os.PathLike[str]) -> Path:
    """A folder that a user names, for good, and where it is a link (a scratch disk) the folder that it leads to.

    Only this one: folders of ours below it must not be links, since others may write where a run lies.
    """
    path = Path(folder).absolute()
    # others are left as they are named: links above may lead elsewhere on another machine
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def refuse_link(folder: Path) -> None:
    """Raise an `OSError` where a folder of ours is a link; those above it are the user's, and may be."""
    if folder.is_symlink():
        raise OSError(f"{folder} is a link, to {os.readlink(folder)!r}. Name the folder itself, or remove the link")


def temporary_beside(target: Path) -> Path:
    """A name that nothing has, which `remove_leftovers` finds should this process be killed."""
    name = os.fsencode(target.name)[:_LONGEST].decode(errors="ignore")
    return target.with_name(f".{name}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left half written in a folder of ours; nobody else may be writing there.

    Args:
        folder: Where; nothing is deleted where it is a link.
        name: Pattern of the names that were to be written.
    """
    if folder.is_symlink():
        return
    for leftover in folder.glob(f".{name}.tmp"):
        delete(leftover)


def delete(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, but never what a link points to."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
