"""A window as a value that any checkpoint takes: one text in it, and its snapshots as files in a folder beside it.

This module knows the states that were given out, and which files each of them needs. It knows no checkpoints: who
wrote a state where, and whether that is still there, it cannot see.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.resume.manifest import Manifest
from pretrain_merge.resume.sidecar import WindowFolder
from pretrain_merge.runtime import ranks

_KEY = "window"  # one text under one key: torch.distributed.checkpoint flattens what is nested, by its shape at loading


class States:
    """States of one window.

    Args:
        folder: Where the files go; None: there are no states.
        keep: Of how many of the newest states the files stay; None: of all.

    Raises:
        ConfigError: `keep` is not a number of states.
    """

    def __init__(self, folder: Path | None, keep: int | None) -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ConfigError(f"keep_windows: {keep!r} is not a number of states. Allowed: 1 and up, or None for all.")
        self._folder = folder.absolute() if folder is not None else None  # for good, should the run change directory
        self._keep = keep
        self._sidecar: WindowFolder | None = None  # claimed by the first state that has files

    def give(self, save: Callable[[Path], Manifest], *, is_sharded: bool) -> dict[str, Any]:
        """A state of the window as it is now.

        Args:
            save: Makes the window durable in a folder.
            is_sharded: Whether every rank has a part of it. Else rank 0 has all, and the others give nothing.

        Raises:
            CheckpointError: The disk refuses, or another run uses the folder.
        """
        folder = self._required()
        # every rank saves the same window otherwise, into one folder
        if ranks.rank() != 0 and not is_sharded:
            return {}
        manifest = save(folder)
        if ranks.rank() == 0 and manifest.files:
            self._note(folder, manifest)
        return {_KEY: json.dumps({"folder": str(folder), "manifest": manifest.to_plain()})}

    def read(self, state: Mapping[str, Any]) -> tuple[Manifest, Path]:
        """What a state says, and the folder in which its files were. Every rank must call it at the same point.

        Args:
            state: What `give` gave, on this rank or on rank 0.

        Raises:
            CheckpointError: It is damaged.
        """
        # what rank 0 has counts: others may have got nothing, or an older one
        text = ranks.gather(state.get(_KEY))[0]
        try:
            plain = json.loads(text)  # type: ignore[arg-type]  # a TypeError says that it is not text
            return Manifest.from_plain(plain["manifest"]), Path(plain["folder"])
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the state is not one of a window, as rank 0 gave it ({type(error).__name__}: {error}). Allowed: what "
                f"state_dict() returned. Resume from another checkpoint."
            ) from error

    def find(self, manifest: Manifest, recorded: Path) -> Path:
        """The folder that has all files of a state: the one that was named here, or the one where they were.

        Raises:
            CheckpointError: Neither has.
        """
        places = list(dict.fromkeys(place for place in (self._folder, recorded) if place is not None))
        for place in places:
            if all((place / file.name).exists() for file in manifest.files):
                return place
        # of the place that the user named: the other one is where the state was written, maybe elsewhere
        absent = next(file.name for file in manifest.files if not (places[0] / file.name).exists())
        raise CheckpointError(
            f"{absent} is not there. Looked in {', '.join(map(str, places))}. Set window_folder to the folder that has "
            f"it; keep_windows says of how many states the files stay."
        )

    def go_on_from(self, manifest: Manifest) -> None:
        """The files of this state are the newest ones again, whatever was given out since it was."""
        if self._folder is not None and ranks.rank() == 0 and manifest.files:
            self._note(self._folder, manifest)

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._sidecar is not None:
            self._sidecar.close()
            self._sidecar = None

    def _required(self) -> Path:
        if self._folder is None:
            raise ConfigError(
                "window_folder: None, and a state has its snapshots in a folder. Name one beside the checkpoints, of "
                "this run alone: RollingMerger(window_folder='run/window')."
            )
        return self._folder

    def _note(self, folder: Path, manifest: Manifest) -> None:
        is_first = self._sidecar is None
        sidecar = self._sidecar = self._sidecar or WindowFolder(folder, keep=self._keep)
        names = [file.name for file in manifest.files]
        # padded: the list is sorted on the disk, and this way its order is that of the run
        sidecar.register(f"state-{manifest.progress.step:020d}", names)
        # which states are still there nobody knows, so the bound alone says which may go
        sidecar.prune(names, lambda state: "there", thoroughly=is_first)
