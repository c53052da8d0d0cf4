"""A window as durable files, each of them written once, and back.

This module knows which snapshot lies in which file, and what a window needs to go on. It knows no views and no
checkpoints of a trainer.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain_merge.cadence import Progress
from pretrain_merge.config import WindowSettings
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.resume import saved_block
from pretrain_merge.resume.manifest import Manifest, SavedBlock, SavedSnapshot
from pretrain_merge.resume.window_files import WindowFiles
from pretrain_merge.window.block_mean import BlockMean
from pretrain_merge.window.breaks import Breaks
from pretrain_merge.window.capture import Capture
from pretrain_merge.window.spike_breaks import SpikeBreaks
from pretrain_merge.window.window import Snapshot


class SavedWindow:
    """The files of one window and of its open block.

    Args:
        settings: The configuration; a part of it decides what a snapshot is.
        block: The open interval of `average: block`, or None.
        breaks: What ended the stretches before.
        spikes: Watches the training loss; None: nobody does.
        capture: Fills the window, and knows which tensors of the model a snapshot holds.
    """

    def __init__(
        self,
        settings: WindowSettings,
        block: BlockMean | None,
        breaks: Breaks,
        spikes: SpikeBreaks | None,
        capture: Capture,
    ) -> None:
        self._settings = settings
        self._stored = capture.stored
        self._block = block
        self._breaks = breaks
        self._spikes = spikes
        self._capture = capture
        self._files: dict[Snapshot, tuple[Path, SnapshotFile]] = {}  # the folder and file of each that was saved
        self._saved_block: tuple[Path, Progress, SavedBlock] | None = None  # as it was written last, and when

    def save(
        self, module: nn.Module, folder: Path, now: Progress, *, lr: tuple[float, ...], snapshot_is_new: bool
    ) -> Manifest:
        """Make every snapshot and the open block a durable file, each once, and say all that is needed to go on.

        Raises:
            CheckpointError: The disk refuses.
        """
        files, window = WindowFiles(folder, module), self._stored.window
        block = self._save_block(self._block, files, now) if self._block is not None else None
        return Manifest(
            settings=_what_a_snapshot_is(self._settings),
            progress=now,
            lr=lr,
            segment_lr=self._breaks.segment_lr,
            phase=self._breaks.phase,
            num_refused=self._breaks.num_refused,
            num_spikes=self._breaks.num_spikes,
            spikes=self._spikes.state_dict() if self._spikes is not None else {},
            segment=window.segment,
            last_break=window.last_break,
            snapshot_is_new=snapshot_is_new,
            parameters=self._names(),
            snapshots=self._save_snapshots(files),
            block=block,
        )

    def restore(self, manifest: Manifest, module: nn.Module, folder: Path) -> None:
        """Fill an empty window, its breaks and the open block.

        Raises:
            ConfigError: This configuration makes other snapshots, or keeps fewer than are held.
            CheckpointError: A file is missing, damaged, or of another model. Nothing was restored.
        """
        # before any file is read: the key says more than tensors that do not fit
        self._refuse_other_settings(manifest)
        try:
            live = self._live(module, manifest)
            # first, since ranks meet there: one that failed is heard before the others wait for it in sharded files
            self._capture.restore(module, live, manifest.segment)
            self._fill(manifest, live, WindowFiles(folder, module))
        # Ctrl-C too: half a window would be merged as if it were a whole one
        except BaseException:
            self._capture.clear()
            self._stored.window.resume_from(0, None)
            raise
        self._breaks.restore(manifest.segment_lr, manifest.phase, manifest.num_refused, manifest.num_spikes)
        if self._spikes is not None:
            self._spikes.load_state_dict(manifest.spikes)

    def _save_snapshots(self, files: WindowFiles) -> tuple[SavedSnapshot, ...]:
        stored, held = self._stored, self._stored.window.snapshots
        saved = {item: self._files[item] for item in held if self._files.get(item, ("",))[0] == files.folder}
        with files.together():
            for item in held:
                if item not in saved:
                    stem = f"snapshot-{item.progress.step:08d}"
                    file = files.save(stored.open_store(), item.slot, stem, stored.slot_kinds)
                    saved[item] = (files.folder, file)
        self._files = {item: saved[item] for item in held}
        return tuple(
            SavedSnapshot(item.segment, item.progress, item.lr, item.phase, file)
            for item, (_, file) in self._files.items()
        )

    def _save_block(self, block: BlockMean, files: WindowFiles, now: Progress) -> SavedBlock:
        """Once per step, however many checkpoints are saved at it: a block is a whole model in float32."""
        if self._stored.names and block.names not in ((), self._stored.names):
            block.invalidate()  # other parameters train since the last snapshot, so this interval gives none
        if self._saved_block is None or self._saved_block[:2] != (files.folder, now):
            self._saved_block = (files.folder, now, saved_block.save(block, files, now.step))
        return self._saved_block[2]

    def _names(self) -> tuple[str, ...]:
        return self._stored.names or (self._block.names if self._block is not None else ())

    def _live(self, module: nn.Module, manifest: Manifest) -> dict[str, Tensor]:
        """The tensors that the files hold, also those that are frozen now (P36), in the order of the files."""
        self._capture.trained.remember(manifest.parameters)
        live = self._capture.trained.tensors(module)
        if gone := [name for name in manifest.parameters if name not in live]:
            raise CheckpointError(
                f"the snapshots are of another model: {gone[0]!r} and {len(gone) - 1} more are not parameters here. "
                f"Build the model with the parameters that it was trained with."
            )
        return {name: live[name] for name in manifest.parameters}

    def _fill(self, manifest: Manifest, live: Mapping[str, Tensor], files: WindowFiles) -> None:
        stored, self._files = self._stored, {}
        stored.window.resume_from(manifest.segment, manifest.last_break)
        for item in manifest.snapshots:
            stored.write(live, files.read(item.file, live, stored.slot_dtypes(live)))
            snapshot = stored.window.add(item.progress, lr=item.lr, phase=item.phase, segment=item.segment)
            self._files[snapshot] = (files.folder, item.file)  # of this run's own folder: not written again
        if self._block is not None and manifest.block is not None:
            saved_block.restore(self._block, manifest.block, live, files)

    def _refuse_other_settings(self, manifest: Manifest) -> None:
        here = _what_a_snapshot_is(self._settings)
        for key in sorted(here.keys() | manifest.settings.keys()):
            if here.get(key) != manifest.settings.get(key):
                raise ConfigError(
                    f"{key}: {here.get(key)!r}, and the snapshots of the resumed run were taken with "
                    f"{manifest.settings.get(key)!r}. Set it back, or start with an empty window."
                )
        if len(manifest.snapshots) > self._settings.config.window:
            raise ConfigError(
                f"window: {self._settings.config.window}, and the resumed run holds {len(manifest.snapshots)} "
                f"snapshots. Keep at least as many, or start with an empty window."
            )


def _what_a_snapshot_is(parsed: WindowSettings) -> dict[str, Any]:
    settings = parsed.config
    keys = ["average", "slot_dtype", "batch_norm", *(["sample_every"] if settings.average == "block" else [])]
    # the interval as it was parsed: 1000 and '1000 steps' are one
    chosen = {key: getattr(settings, key) for key in keys} | {"every": str(parsed.cadence.every)}
    return chosen | {"merge_buffers": list(settings.merge_buffers), "parameters": asdict(settings.parameters)}
