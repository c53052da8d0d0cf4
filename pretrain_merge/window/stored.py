"""The snapshots of one model: which are held (the window) and where their bytes lie (a store, and durable files).

This module joins window and store. It knows nothing of when a snapshot is due and of how snapshots are weighted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge.cadence import Progress
from pretrain_merge.config import WindowConfig
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.parameters.live import identities
from pretrain_merge.resume.manifest import HeldSnapshot
from pretrain_merge.resume.window_files import WindowFiles
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger
from pretrain_merge.stores.choose import choose_store
from pretrain_merge.stores.store import Store, slot_dtype
from pretrain_merge.window.window import Snapshot, Window


@dataclass(frozen=True)
class _Kind:
    """What must be the same of two tensors that are to be merged."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Kind":
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Snapshots:
    """A window of snapshots and their tensors.

    Args:
        settings: `window`, `store`, `store_folder` and `slot_dtype` of the configuration.
    """

    def __init__(self, settings: WindowConfig) -> None:
        self.window = Window(settings.window)
        self._settings = settings
        self._slot_dtype: torch.dtype | None = getattr(torch, settings.slot_dtype) if settings.slot_dtype else None
        self._store: Store | None = None
        self._kinds: dict[str, _Kind] = {}
        self._captured: list[tuple[int, int]] = []
        self._files: dict[Snapshot, tuple[Path, SnapshotFile]] = {}

    def are_of_other_tensors(self, live: Mapping[str, Tensor]) -> bool:
        """Whether the snapshots held are of another set of tensors than the live ones."""
        return bool(self._kinds) and self._kinds != {name: _Kind.of(tensor) for name, tensor in live.items()}

    def capture(
        self,
        live: Mapping[str, Tensor],
        source: Sequence[Tensor],
        progress: Progress,
        lr: tuple[float, ...],
        phase: str,
    ) -> None:
        """Take a snapshot; the oldest one leaves where the window is full.

        Args:
            live: The live tensors by name.
            source: What the snapshot holds of each: the live tensors themselves, or means of them.
            progress: Counters now.
            lr: Learning rate of the last step.
            phase: Name given to the last `mark_phase`.
        """
        self._write(self.window.next_slot(), live, source)
        self.window.add(progress, lr=lr, phase=phase)
        self._captured = identities(live.values())

    def merge_(
        self,
        live: Sequence[Tensor],
        chosen: Sequence[Snapshot],
        weights: Sequence[float],
        *,
        spread: bool | Sequence[float],
    ) -> Spread | None:
        """The weighted sum of snapshots, oldest first, into the live tensors."""
        return self._opened().merge_(live, [item.slot for item in chosen], weights, spread=spread)

    def slot_that_is_raw(self, live: Sequence[Tensor], progress: Progress) -> int | None:
        """The newest slot if it holds the live model bit for bit, so that no copy of raw is needed to restore it."""
        newest = self.window.newest
        is_raw = (
            newest is not None
            and newest.progress == progress
            and self._settings.average == "last"
            and all(slot_dtype(tensor.dtype, self._slot_dtype) == tensor.dtype for tensor in live)
            and self._captured == identities(live)
        )
        return newest.slot if newest is not None and is_raw else None

    def put_back(self, live: Sequence[Tensor], slot: int) -> None:
        """Raw again, from the slot that `slot_that_is_raw` named."""
        self._opened().read_(live, slot)
        self._captured = identities(live)

    def keep(self, files: WindowFiles) -> tuple[HeldSnapshot, ...]:
        """Make every snapshot a durable file, each once, and say which it is; oldest first.

        Raises:
            CheckpointError: The disk refuses.
        """
        self._files = {item: self._files[item] for item in self.window.snapshots if item in self._files}
        for item in self.window.snapshots:
            folder, _ = self._files.get(item, (None, None))
            if folder != files.folder:
                stem = f"snapshot-{item.progress.step:08d}"
                self._files[item] = (files.folder, files.keep(self._opened(), item.slot, stem, self._slot_kinds()))
        return tuple(
            HeldSnapshot(item.segment, item.progress, item.lr, item.phase, self._files[item][1])
            for item in self.window.snapshots
        )

    def load(self, held: Sequence[HeldSnapshot], live: Mapping[str, Tensor], files: WindowFiles) -> None:
        """Fill an empty window from files.

        Args:
            held: The snapshots, oldest first, at most as many as the window keeps.
            live: The live tensors by name.
            files: Reads them; those of this run's own folder are not written again.

        Raises:
            CheckpointError: A file cannot be used.
        """
        for item in held:
            self._write(self.window.next_slot(), live, files.read(item.file, live, self._dtypes(live)))
            snapshot = self.window.add(item.progress, lr=item.lr, phase=item.phase, segment=item.segment)
            self._files[snapshot] = (files.folder, item.file)

    def clear(self) -> None:
        """Forget all snapshots and give their memory back; breaks are remembered."""
        if self._store is not None:
            self._store.clear()
            self._store = None
        self.window.clear()
        self._files.clear()
        self._kinds = {}

    def _write(self, slot: int, live: Mapping[str, Tensor], source: Sequence[Tensor]) -> None:
        dtypes = self._dtypes(live)
        store = self._opened(live)
        self._kinds = {name: _Kind.of(tensor) for name, tensor in live.items()}
        store.write(slot, dict(zip(live, source, strict=True)), dtypes)

    def _dtypes(self, live: Mapping[str, Tensor]) -> list[torch.dtype]:
        return [slot_dtype(tensor.dtype, self._slot_dtype) for tensor in live.values()]

    def _slot_kinds(self) -> dict[str, _Kind]:
        return {
            name: replace(kind, dtype=slot_dtype(kind.dtype, self._slot_dtype)) for name, kind in self._kinds.items()
        }

    def _opened(self, live: Mapping[str, Tensor] | None = None) -> Store:
        if self._store is None:
            live = live or {}
            sizes = zip(live.values(), self._dtypes(live), strict=True)
            slot_bytes = sum(tensor.numel() * dtype.itemsize for tensor, dtype in sizes)
            folder = self._settings.store_folder and Path(self._settings.store_folder) / f"rank-{ranks.rank():04d}"
            self._store, said = choose_store(
                self._settings.store,
                list(live.values()),
                self.window.size * slot_bytes,
                folder or None,
                slot_bytes=slot_bytes,
            )
            logger.info(said)
        return self._store
