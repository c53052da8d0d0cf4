"""Durable files of one model's window: plain ones, or folders through all ranks where parameters are sharded.

This module chooses between the two. It knows no window and no cadence.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_merge import parameters
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, sharded_folder, snapshot_file
from pretrain_merge.files.layout import Layout
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.stores.store import Store


class WindowFiles:
    """Files in one folder.

    Args:
        folder: Where they lie.
        module: The live model, whose shards say which parts of which parameters this rank has.
    """

    def __init__(self, folder: Path, module: nn.Module) -> None:
        self.folder = folder
        self._module = module
        self._is_sharded = parameters.is_sharded(module)
        self._batch: atomic.Batch | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Files that are complete when the block ends; many small ones do not wait for the disk one by one.

        Raises:
            CheckpointError: The disk refuses.
        """
        try:
            with atomic.batch() as self._batch:
                yield
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"cannot write the window to {self.folder}: {error}. Free space there, or set window_folder to another "
                f"folder."
            ) from error
        finally:
            self._batch = None

    def save(self, store: Store, slot: int, stem: str, kinds: Mapping[str, Any]) -> SnapshotFile:
        """Make a file of a store's slot.

        Args:
            store: Where the slot is.
            slot: Its number.
            stem: What it is and its step.
            kinds: By name, `shape`, `dtype` and `device` of the tensors in it.

        Raises:
            CheckpointError: The disk refuses.
        """
        if not self._is_sharded:
            return store.save(slot, self.folder, stem, batch=self._batch)
        # DCP writes tensors, not slots: one snapshot more in memory while it is saved
        tensors = {name: torch.empty(kind.shape, dtype=kind.dtype, device=kind.device) for name, kind in kinds.items()}
        store.read_(list(tensors.values()), slot)
        return self.write(stem, tensors)

    def write(self, stem: str, tensors: Mapping[str, Tensor]) -> SnapshotFile:
        """Make a file of tensors of this rank.

        Raises:
            CheckpointError: The disk refuses.
        """
        if self._is_sharded:
            return sharded_folder.write(self.folder, stem, parameters.as_shards(self._module, tensors))
        layout = Layout.of(tensors, [tensor.dtype for tensor in tensors.values()])
        parts = {name: [tensor] for name, tensor in tensors.items()}
        return snapshot_file.write(self.folder, stem, layout, parts, batch=self._batch)

    def read(self, file: SnapshotFile, live: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The tensors of a file, as far as this rank has them, in the order of the live ones.

        Args:
            file: What it must be.
            live: The live tensors by name.
            dtypes: What each of them is in the file.

        Raises:
            CheckpointError: It cannot be used.
        """
        if file.name.endswith(sharded_folder.SUFFIX):
            chosen = zip(live.items(), dtypes, strict=True)
            tensors = {name: torch.empty_like(tensor, dtype=dtype) for (name, tensor), dtype in chosen}
            sharded_folder.read(self.folder, file, parameters.as_shards(self._module, tensors))
            return list(tensors.values())
        # every rank has the whole in that file, and nothing in it says which part is whose
        if self._is_sharded:
            raise CheckpointError(
                f"{self.folder / file.name} was written without sharding, and this run is sharded. Resume it as it "
                f"was started."
            )
        mapped = snapshot_file.read(self.folder, file, Layout.of(live, dtypes))
        return [tensor.to(target.device) for tensor, target in zip(mapped, live.values(), strict=True)]
