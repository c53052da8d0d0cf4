"""The window of a run beside its Lightning checkpoints: written before each of them, restored from, and cleaned up.

This module knows which checkpoints a Trainer writes, and where. It knows no hooks and no merging.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain_merge import parameters
from pretrain_merge.callbacks.borrowing import wrapped
from pretrain_merge.callbacks.run_state import RunState
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files.fingerprints import Fingerprints
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.resume.manifest import Manifest
from pretrain_merge.resume.sidecar import WindowFolder
from pretrain_merge.runtime import ranks


class KeptWindow:
    """The sidecar of a run, in step with the checkpoints that its Trainer writes.

    Args:
        trainer: Its `save_checkpoint` tells from now on which checkpoints there are.
        run_folder: Where the records of the run are.
        folder: Where the files of the window go. Rank 0 writes them.
        keep: Of how many checkpoints, the newest, the windows are kept; None: of all that exist.

    Raises:
        CheckpointError: The folder cannot be written, or another run is using it.
    """

    def __init__(self, trainer: Any, run_folder: Path, folder: Path, *, keep: int | None = None) -> None:
        self._trainer = trainer
        self.run_folder, self.folder = run_folder.absolute(), folder.absolute()
        self._keep = keep
        self._sidecar = WindowFolder(folder, keep=keep) if trainer.is_global_zero else None
        self._held: list[str] = []
        self._checkpoint = ""
        self._root = Path(trainer.default_root_dir).absolute()
        folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        self._fingerprints = Fingerprints(self.folder, [trainer.default_root_dir, trainer.ckpt_path, *folders])
        self._watching = ExitStack()  # until `release`: a checkpoint may be saved after the run
        self._watching.enter_context(wrapped(trainer, "save_checkpoint", self._save_checkpoint))

    def keep(self, merger: RollingMerger) -> Manifest | None:
        """Make the window durable; None on ranks that need not. Collective where the module is sharded.

        Raises:
            CheckpointError: The disk refuses.
        """
        module = self._trainer.lightning_module
        if self._sidecar is None and not parameters.is_sharded(module):
            return None
        manifest = merger.manifest(module, self.folder)
        self._held = [file.name for file in manifest.files]
        return manifest

    def announce(self) -> None:
        """A checkpoint that is being written will need what `keep` made durable."""
        if self._sidecar is not None and self._checkpoint:
            self._sidecar.register(self._checkpoint, self._held, self._fingerprints.of(self._checkpoint))

    def refuse_missing_state(self) -> None:
        """Tell a checkpoint of a run without ModelMerging from one that lost the state of ours that it had.

        Raises:
            CheckpointError: The sidecar knows it, so it had one.
        """
        checkpoint = str(self._trainer.ckpt_path or "")
        knew = self._sidecar is not None and checkpoint and self._sidecar.knows(self._key(checkpoint))
        if ranks.any_rank(bool(knew)):
            raise CheckpointError(
                f"{checkpoint} was written with a window, as {self.folder} tells, and now has none: it is damaged, or "
                f"was written again without ModelMerging. Resume from another checkpoint."
            )

    def restore(self, merger: RollingMerger, module: Any, state: RunState) -> None:
        """Fill the window of a resumed run; every rank the same way.

        Raises:
            CheckpointError: It cannot be restored on this rank or on another.
            ConfigError: The configuration makes other snapshots.
        """
        with ranks.all_or_none("restore the window"):
            # where `fit` is called once more, ranks have what they remembered: under DDP rank 0 alone has a window
            window = ranks.gather(state.window)[0]
            with _on_all():
                manifest, folder = self._found(replace(state, window=window))
            try:
                with _on_all():
                    self._fill(merger, manifest, module, folder)
            except BaseException:
                merger.close()  # also where it was read on this rank
                raise

    def prune(self, *, thoroughly: bool = True) -> None:
        """Delete files that no checkpoint needs any more."""
        if self._sidecar is not None:
            self._sidecar.prune(self._held, self._fingerprints.of, thoroughly=thoroughly)

    def close(self) -> None:
        """Let other runs use the folder. A checkpoint that is saved later still announces what it needs."""
        if self._sidecar is not None:
            with suppress(OSError):  # of a full disk, say; the next run prunes again
                self.prune()
            self._sidecar.close()

    def release(self) -> None:
        """The Trainer's checkpoints do not matter any more."""
        self._sidecar = None
        self._watching.close()

    def _save_checkpoint(self, save: Callable[..., None], filepath: Any, *arguments: Any, **options: Any) -> None:
        self._fingerprints.trust(filepath)
        self._checkpoint = self._key(filepath)
        try:
            save(filepath, *arguments, **options)
        finally:
            self._checkpoint = ""
        with ranks.all_or_none("note which checkpoints there are"):
            self.prune(thoroughly=False)  # at each save: as long as ever, however many there were

    def _key(self, checkpoint: Any) -> str:
        """How the sidecar names a checkpoint: relative where both are of one run, which may be moved as a whole."""
        if "://" in str(checkpoint):
            return str(checkpoint)
        path = Path(checkpoint).absolute()
        together = any(
            path.is_relative_to(root) and self.folder.is_relative_to(root) for root in (self._root, self.run_folder)
        )
        return os.path.relpath(path, self.folder) if together else str(path)

    def _found(self, state: RunState) -> tuple[Manifest, Path]:
        if state.window is None:
            raise CheckpointError(state.lost or "the checkpoint was written without one.")
        manifest = Manifest.from_plain(state.window)
        return manifest, self._find(manifest, state)

    def _fill(self, merger: RollingMerger, manifest: Manifest, module: Any, folder: Path) -> None:
        merger.restore(manifest, module, folder)
        if folder == self.folder:
            self._held = [file.name for file in manifest.files]
            if self._sidecar is not None and self._trainer.ckpt_path:  # it may have been moved or renamed
                self._sidecar.register(self._key(self._trainer.ckpt_path), self._held)

    def _find(self, manifest: Manifest, state: RunState) -> Path:
        """The first folder that has all files: of this run, as recorded, or beside the checkpoint that was moved."""
        places = list(dict.fromkeys(self._places(state)))
        absent = {place: [file.name for file in manifest.files if not (place / file.name).exists()] for place in places}
        best = min(places, key=lambda place: len(absent[place]))
        if absent[best]:
            bound = f" keep_windows: {self._keep} keeps no older ones." if self._keep else ""
            raise CheckpointError(f"{absent[best][0]} is not there. Looked in {', '.join(map(str, places))}.{bound}")
        return best

    def _places(self, state: RunState) -> Iterator[Path]:
        yield self.folder
        recorded = Path(state.window_folder)
        yield recorded
        checkpoint = str(self._trainer.ckpt_path or "")
        if checkpoint and "://" not in checkpoint:
            inside_run = Path(os.path.relpath(recorded, state.run_folder))
            for folder in list(Path(checkpoint).absolute().parents)[:2]:
                yield folder / inside_run


@contextmanager
def _on_all() -> Iterator[None]:
    """A part that every rank does; where one cannot, all raise what `on_missing` may answer."""
    failure: CheckpointError | ConfigError | None = None
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        failure = error
    num_failed, *_ = ranks.count(failure is not None)
    if num_failed:
        raise failure or CheckpointError("another rank could not read it; its message says why.")
