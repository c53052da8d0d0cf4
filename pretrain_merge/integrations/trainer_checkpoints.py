"""The window of a Hugging Face run beside its checkpoints: written before each of them, read back, and cleaned up.

This module knows the folders `checkpoint-<step>` and a folder `window/` of one run. It knows no hooks and no merging.
What is needed to go on from step 100 is `window/state-00000100.json` and the snapshots that it names.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pretrain_merge.callbacks.run_state import RunState
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.resume.sidecar import WindowFolder

_PREFIX, _SUFFIX = "state-", ".json"


class TrainerCheckpoints:
    """The sidecar of a run; on rank 0.

    Args:
        output: The Trainer's `output_dir`, where its checkpoints are.
        folder: Where the files of the window go.
        keep: Of how many windows, the newest, the files are kept; None: of all that checkpoints need.

    Raises:
        CheckpointError: The folder cannot be written, or another run is using it.
    """

    def __init__(self, output: Path, folder: Path, keep: int | None) -> None:
        self._output, self.folder = output, folder
        self._sidecar = WindowFolder(folder, keep=keep)
        self._held: list[str] = []

    def note(self, state: RunState, names: Iterable[str]) -> None:
        """A checkpoint of this step is about to be written, and will need these files.

        Raises:
            CheckpointError: The disk refuses.
        """
        step, self._held = state.progress.step, list(names)
        checkpoint = self._key(step)
        self._sidecar.register(checkpoint, self._held, self._fingerprint(checkpoint))
        path = _path(self.folder, step)
        try:
            atomic.write(path, json.dumps(state.to_plain()))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}. Free space there, or set window_folder.") from error

    def knows(self, step: int) -> bool:
        """Whether a checkpoint of this step was noted, and not been gone since."""
        return self._sidecar.knows(self._key(step))

    def hold(self, names: Iterable[str]) -> None:
        """The window was read back from files of this folder."""
        self._held = list(names)

    def prune(self) -> None:
        """Delete what no checkpoint that is still there needs."""
        self._sidecar.prune(self._held, self._fingerprint)
        for path in self.folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            step = path.name[len(_PREFIX) : -len(_SUFFIX)]
            if step.isascii() and step.isdigit() and not self.knows(int(step)):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other runs use the folder."""
        with suppress(OSError):  # of a full disk, say; the next run prunes again
            self.prune()
        self._sidecar.close()

    def _key(self, step: int) -> str:
        # relative: a run is moved as a whole
        return os.path.relpath(self._output / f"checkpoint-{step}", self.folder)

    def _fingerprint(self, checkpoint: str) -> str | None:
        return "there" if (self.folder / checkpoint).exists() else None


def find_state(step: int, folders: Iterable[Path]) -> tuple[RunState, Path] | None:
    """What is needed to go on from a step, and the folder that has it; None where none of them has.

    Raises:
        CheckpointError: It is damaged.
    """
    for folder in folders:
        path = _path(folder, step)
        if path.exists():
            try:
                return RunState.from_plain(untrusted.read_json(path, is_ours=True)), folder
            except ValueError as error:
                raise CheckpointError(f"{path} is damaged ({error}). Resume from another checkpoint.") from error
    return None


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}{_SUFFIX}"
