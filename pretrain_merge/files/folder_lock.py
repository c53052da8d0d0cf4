"""One process in one folder: a lock that ends with its process, however that ends, and names its holder.

This module knows the file that is locked and nothing of what else is in the folder.
"""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic

_NAME = "lock"


@dataclass
class _Held:
    """A lock of this process: record locks do not tell two holders in one process apart."""

    descriptor: int
    holder: str
    process: int
    num_holders: int = 1


_held_here: dict[Path, _Held] = {}


def claim(folder: Path, *, remedy: str, is_shared_here: bool = False, name: str = _NAME) -> bool:
    """Lock a folder, which is created where needed, until `release`.

    Args:
        folder: An absolute path.
        remedy: What to do where the folder cannot be had; ends an error's message.
        is_shared_here: Whether others of this process may hold it too, if they allow the same.
        name: Of the lock's file.

    Returns:
        Whether nobody in this process held it before, so that all there is a leftover.

    Raises:
        CheckpointError: The folder cannot be written, or another run, which is named, is using it.
    """
    held = _held_here.get(folder / name)
    if held is not None and held.process == os.getpid():
        if not is_shared_here:
            raise _in_use(folder, held.holder, remedy)
        # the record lock is the process's already; a second one would be given, and closing it would drop both
        held.num_holders += 1
        return False
    try:
        atomic.make_folder(folder)
        _held_here[folder / name] = _locked(folder / name, remedy)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write to {folder}: {error}. {remedy}") from error
    return True


def release(folder: Path, *, name: str = _NAME) -> None:
    """Let others use the folder."""
    path = folder / name
    held = _held_here[path]
    if held.process != os.getpid():  # inherited by a fork, which holds no lock
        return
    held.num_holders -= 1
    if held.num_holders == 0:
        del _held_here[path]
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(held.descriptor)


def _locked(path: Path, remedy: str) -> _Held:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                holder = os.read(descriptor, 300).decode(errors="replace").strip()
                os.close(descriptor)
                raise _in_use(path.parent, holder or "another process", remedy) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the holder before removed the file between our two calls
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    try:
        if os.fstat(descriptor).st_nlink == 1:  # else a second name of something that is not ours to overwrite
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
    except OSError:
        os.close(descriptor)
        raise
    return _Held(descriptor, holder, os.getpid())


def _in_use(folder: Path, holder: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{folder} is in use by {holder}. Two runs cannot share one folder: stop that one. {remedy}")
