"""The folder `window/` of one run: durable files of snapshots, which checkpoint needs which of them, and one lock.

This module knows files and the paths of checkpoints. It knows no tensors and no steps. What a checkpoint will need is
noted before it is written, and a file is deleted only when every checkpoint that needed it is known to be gone.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, folder_lock, untrusted
from pretrain_merge.files.snapshot_file import is_ours
from pretrain_merge.runtime.log import logger

_NEEDS = "checkpoints.json"


@dataclass(frozen=True)
class _Registered:
    """A checkpoint that is to be written: what was at its path before, and how often it was registered since."""

    before: str | None
    times: int


class WindowFolder:
    """Durable files of one run, locked against other runs.

    Args:
        folder: Where they lie; created where needed.

    Raises:
        CheckpointError: The folder cannot be written, or another run, which is named, is using it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        folder_lock.claim(self.folder, remedy="Set window_folder to a folder that can be written, of this run alone.")
        self._release = weakref.finalize(self, _release, self.folder)  # also if nobody closes it
        self._needs = self._read_needs()
        self._unwritten: dict[str, _Registered] = {}
        atomic.remove_leftovers(self.folder)

    def register(self, checkpoint: str, names: Iterable[str], before: str | None = None) -> None:
        """Note which files a checkpoint will need; call before it is written.

        Args:
            checkpoint: Its path.
            names: The files.
            before: What is at its path now, as `prune` will be told. Until that has changed, and it may be written in
                the background, it is an older checkpoint, whose needs are kept as well.
        """
        self._forget_overwritten(checkpoint, before)
        times = self._unwritten[checkpoint].times if checkpoint in self._unwritten else 0
        self._needs[checkpoint] = [*self._needs.get(checkpoint, []), sorted(names)]
        self._unwritten[checkpoint] = _Registered(before, times + 1)
        self._write_needs()

    def knows(self, checkpoint: str) -> bool:
        """Whether a checkpoint was registered, and not been gone since."""
        return checkpoint in self._needs

    def prune(self, held: Iterable[str], fingerprint_of: Callable[[str], str | None]) -> None:
        """Delete files that neither a checkpoint nor the window needs; call after a checkpoint was written.

        Args:
            held: Files of the window as it is now.
            fingerprint_of: What is at the path of a checkpoint, in any words that are others for another file; None:
                nothing.
        """
        before = dict(self._needs)
        found = {path: fingerprint_of(path) for path in before if path}
        for path, now in found.items():
            self._forget_overwritten(path, now)
        gone = {path for path, now in found.items() if now is None and path not in self._unwritten}
        self._needs = {path: needs for path, needs in self._needs.items() if path not in gone}
        if self._needs != before:
            self._write_needs()
        needed = {name for needs in self._needs.values() for names in needs for name in names} | set(held)
        for file in self._files():
            if file.name not in needed:
                atomic.delete(file)

    def close(self) -> None:
        """Let other runs use the folder; it goes where nothing is in it."""
        self._release()

    def _forget_overwritten(self, path: str, now: str | None) -> None:
        """Where another file than before is at a path, one that was registered was written, and older ones are gone."""
        registered = self._unwritten.get(path)
        if registered is None or now in (None, registered.before):
            return
        self._needs[path] = self._needs[path][-registered.times :]
        if registered.times == 1:
            del self._unwritten[path]
        else:
            self._unwritten[path] = _Registered(now, registered.times - 1)

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*-*-*.*") if is_ours(path.name)]

    def _read_needs(self) -> dict[str, list[list[str]]]:
        path = self.folder / _NEEDS
        if not os.path.lexists(path):
            return {}
        try:
            needs = untrusted.read_json(path, is_ours=True)
            if isinstance(needs, dict) and all(_are_needs(value) for value in needs.values()):
                return needs
        except (OSError, ValueError):
            pass
        logger.warning(
            f"{path} is damaged. It only says what may be deleted, so every file now there is kept for good."
        )
        self._needs = {"": [sorted(file.name for file in self._files())]}  # by checkpoints that nobody can name
        self._write_needs()
        return self._needs

    def _write_needs(self) -> None:
        path = self.folder / _NEEDS
        if not self._needs:
            path.unlink(missing_ok=True)
            return
        try:
            atomic.make_folder(self.folder)  # it went with `close` where nothing was in it
            atomic.write(path, json.dumps(self._needs, indent=1, sort_keys=True))
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error}. Free space there, or set window_folder to another folder."
            ) from error


def _are_needs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value
    )


def _release(folder: Path) -> None:
    folder_lock.release(folder)
    with suppress(OSError):  # not empty
        folder.rmdir()
