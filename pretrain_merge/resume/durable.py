"""A window that outlives its process: as a state that any checkpoint takes, and as a manifest beside files.

`DurableWindow` knows when files are written and read, and what is done where they are missing. The modules beside it
know which snapshot lies in which file, and which files a state needs. It knows no views and no trainer's checkpoints.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from pretrain_merge.config import WindowSettings
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files import atomic
from pretrain_merge.parameters import Masters, Modules, is_sharded
from pretrain_merge.resume.manifest import Manifest
from pretrain_merge.resume.saved_window import SavedWindow
from pretrain_merge.resume.states import States
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.observed import ObservedWindow


class DurableWindow(ObservedWindow):
    """An observed window that is saved, and goes on where another one was.

    Args:
        parsed: Which snapshots, and what ends a stretch of them.
        masters: Gives the float32 original of a parameter in 16 bits; None: snapshots hold the parameters.
        window_folder: Where `state_dict` keeps the snapshots that a checkpoint needs.
        keep_windows: Of how many of the newest states the snapshots stay there; None: of all.
        on_missing: When `load_state_dict` finds no such window: "error", or "refill", which starts an empty one.

    Raises:
        ConfigError: `on_missing` or `keep_windows` is impossible.
    """

    def __init__(
        self,
        parsed: WindowSettings,
        masters: Masters | None,
        *,
        window_folder: str | PathLike[str] | None,
        keep_windows: int | None,
        on_missing: str,
    ) -> None:
        if on_missing not in ("error", "refill"):
            raise ConfigError(f"on_missing: {on_missing!r} is not error or refill.")
        self._on_missing, self._notices = on_missing, WarnOnce()
        super().__init__(parsed, masters, self._notices)
        # which files hold the snapshots
        self._saved = SavedWindow(parsed, self._block, self._breaks, self._spikes, self._capture)
        self._states = States(atomic.named_by_user(window_folder) if window_folder is not None else None, keep_windows)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here exactly, as any checkpoint takes it: one text.

        The snapshots themselves become durable files in `window_folder`, each once; those that no state needs any more
        (`keep_windows`) are deleted. Fabric, accelerate and `torch.distributed.checkpoint` call this themselves where
        the merger is a part of what they save. Where the model is sharded every rank must call it at the same point.

        Raises:
            ConfigError: There is no `window_folder`.
            CheckpointError: The disk refuses, or another run uses the folder.
        """
        module = self._modules.one or nn.Module()  # nothing was observed yet, and there is nothing to save
        return self._states.give(lambda folder: self.manifest(module, folder), is_sharded=is_sharded(module))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the merger was that gave the state. Every rank must call it at the same point.

        Args:
            state: What `state_dict` returned. The files that it needs may have been moved to `window_folder`.

        Raises:
            CheckpointError: The state is damaged, one of its files missing or damaged, or it is of another model.
                Nothing was restored. Where `on_missing` is "refill", the window starts empty instead.
            ConfigError: The model is not known yet, or this configuration makes other snapshots.
        """
        if self._modules.one is None:
            raise ConfigError(
                "load_state_dict() was called before the model is known. Allowed: after watch(model), which says whose "
                "parameters the snapshots are of. Call it once the model is on its device, sharded and compiled."
            )
        manifest = None
        try:
            manifest, recorded = self._states.read(state)
            self.restore(manifest, self._modules.one, self._states.find(manifest, recorded))
            self._states.go_on_from(manifest)
        except (CheckpointError, ConfigError) as error:
            if self._on_missing == "error":
                raise type(error)(f"the window cannot be restored: {error} Or set on_missing='refill'.") from error
            self._notices.warn("refill", f"the window starts empty (on_missing: refill). {error}")
            if manifest is not None:
                self.resume_from(manifest.progress)  # the counters go on: no snapshot is taken for what lies behind

    def manifest(self, module: Modules, folder: str | PathLike[str]) -> Manifest:
        """All that is needed to go on from here exactly; the tensors of it are durable files when this returns.

        `state_dict` does the same for a checkpoint, and deletes old files. Here both are the caller's business.

        Args:
            module: The model that was observed. Where it is sharded, every rank must call this at the same point.
            folder: Where the files go. What is there already is not written again.

        Raises:
            CheckpointError: The disk refuses.
        """
        one = self._modules.as_one(module)
        return self._saved.save(one, Path(folder), self._progress, lr=self._lr, snapshot_is_new=self._snapshot_is_new)

    def restore(self, manifest: Manifest, module: Modules, folder: str | PathLike[str]) -> None:
        """Go on where another merger was: its window, open block, breaks and counters.

        Args:
            manifest: What `manifest` gave; `Manifest.to_plain` and `from_plain` take it through JSON.
            module: The live model, with the shapes and dtypes that it had; what is frozen in it does not matter.
            folder: Where the files lie.

        Raises:
            ConfigError: This configuration makes other snapshots, or keeps fewer than are held.
            CheckpointError: A file is missing, damaged, or of another model. Nothing was restored.
        """
        # first, since it may refuse, and then nothing here has changed
        self._saved.restore(manifest, self._modules.as_one(module), Path(folder))
        self._progress, self._lr, self._snapshot_is_new = manifest.progress, manifest.lr, manifest.snapshot_is_new

    def close(self) -> None:
        """Give the memory of the window back, and its folder to other runs."""
        self._capture.clear()
        self._states.close()

    def __getstate__(self) -> NoReturn:
        raise CheckpointError(
            "a RollingMerger cannot be pickled: its window is memory and files. Put merger.state_dict() into the "
            "checkpoint, as Fabric does by itself except where it saves shards."
        )
