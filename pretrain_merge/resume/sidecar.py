"""The folder `window/` of one run: durable files of snapshots, which checkpoint needs which of them, and one lock.

This module knows files and the paths of checkpoints. It knows no tensors and no steps. What a checkpoint will need is
noted before it is written, and a file is deleted only when every checkpoint that needed it is known to be gone.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, folder_lock
from pretrain_merge.files.snapshot_file import is_ours
from pretrain_merge.resume.needs import Needs
from pretrain_merge.runtime.log import logger

# After each save so many checkpoints are looked at, in turns: all of them where few are kept, and as long as ever where
# thousands are. Those that are gone are noticed some saves later, and when the run ends.
_NUM_LOOKED_AT = 64


@dataclass(frozen=True)
class _Registered:
    """A checkpoint that is to be written: what was at its path before, and how often it was registered since."""

    before: str | None
    times: int


class WindowFolder:
    """Durable files of one run, locked against other runs.

    Args:
        folder: Where they lie; created where needed.
        keep: Of how many windows, the newest that checkpoints need, the files are kept; None: of all.

    Raises:
        CheckpointError: The folder cannot be written, or another run, which is named, is using it.
    """

    def __init__(self, folder: Path, *, keep: int | None = None) -> None:
        self.folder = folder.absolute()
        self._keep = keep
        folder_lock.claim(self.folder, remedy="Set window_folder to a folder that can be written, of this run alone.")
        self._release = weakref.finalize(self, _release, self.folder)  # also if nobody closes it
        atomic.remove_leftovers(self.folder)
        self._held: set[str] = set()  # by the window, when it was last told
        self._unwritten: dict[str, _Registered] = {}
        with self._writing():
            self._needs = Needs(self.folder)
            if self._needs.is_damaged:
                logger.warning(
                    f"the list of needs in {self.folder} is damaged. It only says what may be deleted, so every file "
                    f"now there is kept for good."
                )
                # by checkpoints that nobody can name
                self._needs.update([("", [sorted(file.name for file in self._files())])])
                self._needs.compact()
        self._turns = deque(self._needs.checkpoints)

    def register(self, checkpoint: str, names: Iterable[str], before: str | None = None) -> None:
        """Note which files a checkpoint will need; call before it is written.

        Args:
            checkpoint: Its path.
            names: The files.
            before: What is at its path now, as `prune` will be told. Until that has changed, and it may be written in
                the background, it is an older checkpoint, whose needs are kept as well.
        """
        kept = self._without_overwritten(checkpoint, before)
        times = self._unwritten[checkpoint].times if checkpoint in self._unwritten else 0
        if checkpoint not in self._needs:
            self._turns.append(checkpoint)
        with self._writing():
            self._needs.update([(checkpoint, [*kept, sorted(names)])], outlives_run=True)
        self._unwritten[checkpoint] = _Registered(before, times + 1)

    def knows(self, checkpoint: str) -> bool:
        """Whether a checkpoint was registered, and not been gone since."""
        return checkpoint in self._needs

    def prune(
        self, held: Iterable[str], fingerprint_of: Callable[[str], str | None], *, thoroughly: bool = True
    ) -> None:
        """Delete files that neither a checkpoint nor the window needs; call after a checkpoint was written.

        Args:
            held: Files of the window as it is now.
            fingerprint_of: What is at the path of a checkpoint, in any words that are others for another file; None:
                nothing.
            thoroughly: Whether to look at all checkpoints and files, which takes the longer the more there are.
        """
        changes = []
        for checkpoint in self._next(len(self._turns) if thoroughly else _NUM_LOOKED_AT):
            now = fingerprint_of(checkpoint) if checkpoint else ""
            kept = self._without_overwritten(checkpoint, now)
            is_gone = now is None and checkpoint not in self._unwritten
            if is_gone or kept != self._needs[checkpoint]:
                changes.append((checkpoint, [] if is_gone else kept))
            if not is_gone:
                self._turns.append(checkpoint)
        with self._writing():
            self._needs.update(changes)
            self._forget_beyond_bound()
        before, self._held = self._held, set(held)
        unneeded = self._needs.take_unneeded() | before
        if thoroughly:
            unneeded |= {file.name for file in self._files()}
        for name in unneeded - self._held:
            # the list is a file that others may have written: a name in it must not leave the folder
            if not self._needs.is_needed(name) and is_ours(name):
                atomic.delete(self.folder / name)

    def close(self) -> None:
        """Let other runs use the folder; it goes where nothing is in it."""
        with suppress(OSError):  # of a full disk, say; the next run does it
            self._needs.compact()
        self._release()

    def _forget_beyond_bound(self) -> None:
        """Forget the needs of checkpoints that are older than those whose windows are kept."""
        if self._keep is None:
            return
        windows: set[tuple[str, ...]] = set()
        old = set()
        # the one without a name needs what was there when the list was damaged
        for checkpoint in filter(None, reversed(self._needs.checkpoints)):
            # several checkpoints of one step need one window, which counts once
            window = tuple(self._needs[checkpoint][-1])
            if window not in windows and len(windows) == self._keep:
                old.add(checkpoint)
            else:
                windows.add(window)
        if old:
            self._needs.update((checkpoint, []) for checkpoint in old)
            self._turns = deque(checkpoint for checkpoint in self._turns if checkpoint not in old)
            self._unwritten = {key: value for key, value in self._unwritten.items() if key not in old}

    def _next(self, number: int) -> Iterator[str]:
        """The checkpoints whose turn it is; those that are still there go to the end of the queue."""
        for _ in range(min(number, len(self._turns))):
            yield self._turns.popleft()

    def _without_overwritten(self, path: str, now: str | None) -> list[list[str]]:
        """What is needed for a path; where another file is there now, one that was registered was written to it."""
        registered = self._unwritten.get(path)
        if registered is None or now in (None, registered.before):
            return self._needs[path]
        if registered.times == 1:
            del self._unwritten[path]
        else:
            self._unwritten[path] = _Registered(now, registered.times - 1)
        return self._needs[path][-registered.times :]

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*-*-*.*") if is_ours(path.name)]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write the list of needs in {self.folder}: {error}. Free space there, or set window_folder to "
                f"another folder."
            ) from error


def _release(folder: Path) -> None:
    folder_lock.release(folder)
    with suppress(OSError):  # not empty
        folder.rmdir()
