"""The folder of a merge while it is being written, and the moment in which it takes its name.

This module knows names and renames, and which earlier work may be gone on with: that of the very same merge.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, folder_lock
from pretrain_merge.files.atomic import sync
from pretrain_merge.offline import shards
from pretrain_merge.offline.files import is_remote, size_of
from pretrain_merge.runtime import ranks

PLAN = "plan.json"


def prepare(partial: Path, identity: Mapping[str, Any]) -> None:
    """A folder for this merge and no other; finished files of the same one, which was broken off, stay.

    Args:
        partial: The folder.
        identity: Plain values that are the same for the same merge.

    Raises:
        CheckpointError: It cannot be written.
    """
    text = json.dumps(identity, indent=1, sort_keys=True)
    plan = partial / PLAN
    try:
        # whole texts are compared: a file that was exchanged since has another time or size
        if not plan.exists() or plan.read_bytes() != text.encode():
            # finished files of another merge would be taken for ours
            atomic.delete(partial)
            atomic.make_folder(partial)
            atomic.write(plan, text)
    except OSError as error:
        raise CheckpointError(f"cannot write {partial}: {error}. Choose another folder.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One merge at a time into one folder."""
    with ranks.all_or_none(f"lock {folder}"):
        if ranks.rank() == 0:
            try:
                atomic.make_folder(folder.parent)
            except OSError as error:
                raise CheckpointError(f"cannot make {folder.parent}: {error}. Choose another folder.") from error
            folder_lock.claim(folder, remedy="Write to another folder.")
    try:
        yield
    finally:
        if ranks.rank() == 0:
            folder_lock.release(folder)
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def removed_if_empty(partial: Path, finished: str = f"*{shards.NOTE}") -> Iterator[None]:
    """After an error nothing stays but a folder with finished work, which the next try goes on behind.

    Args:
        partial: The folder.
        finished: Pattern of files that are there once there is such work.
    """
    try:
        yield
    except BaseException:
        # BaseException: Ctrl-C in the first second leaves nothing either
        if ranks.rank() == 0 and not any(partial.glob(finished)):
            atomic.delete(partial)
        raise


def publish(partial: Path, out: Path, *, without: Sequence[Path] = ()) -> None:
    """Flush everything, and give the folder its name.

    Args:
        partial: The folder.
        out: Its name.
        without: What is deleted first: only the making needed it. A kill behind that begins anew.

    Raises:
        CheckpointError: The disk refuses, or something is at that name by now.
    """
    try:
        for path in without:
            path.unlink()
        atomic.remove_leftovers(partial)
        # contents before the name, or a loss of power leaves a complete folder of empty files
        for path in sorted(partial.iterdir()):
            sync(path)
        sync(partial)
        if out.exists():
            raise CheckpointError(f"{out} exists by now and is never overwritten. {partial} is complete: rename it.")
        # POSIX renames over an empty folder, so the check before is what refuses
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {out}: {error}. Free space there, and run the same again.") from error


def fingerprint(file: str) -> list[int]:
    """What tells a file from another one at its place, without reading it."""
    if is_remote(file):
        return [size_of(file) or 0]
    status = Path(file).stat()
    # reading it all to be sure would take as long as the merge that is resumed
    return [status.st_size, status.st_mtime_ns]
