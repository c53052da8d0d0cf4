"""The snapshots of one model: which are held (the window) and where their bytes lie (a store).

This module joins window and store, by the names of tensors. It knows nothing of when a snapshot is due, of how
snapshots are weighted, and of durable files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge.cadence import Progress
from pretrain_merge.config import WindowConfig
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger
from pretrain_merge.stores.choose import choose_store
from pretrain_merge.stores.store import Store, slot_dtype
from pretrain_merge.window.window import Snapshot, Window


@dataclass(frozen=True)
class Kind:
    """What must be the same of two tensors that are to be merged."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        """That of a live tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)


class StoredWindow:
    """A window of snapshots and their tensors.

    Args:
        settings: `window`, `store`, `store_folder` and `slot_dtype` of the configuration.
        of_masters: Slots hold what an optimizer keeps of parameters in float32, whatever these are.

    Attributes:
        num_swaps: Blocks that are open in which the live model may hold a merge, and raw may be a slot.
    """

    def __init__(self, settings: WindowConfig, *, of_masters: bool = False) -> None:
        self._least = torch.float32 if of_masters else None
        self.window = Window(settings.window)
        self.num_swaps = 0
        self._settings = settings
        self._slot_dtype: torch.dtype | None = getattr(torch, settings.slot_dtype) if settings.slot_dtype else None
        self._store: Store | None = None
        self._kinds: dict[str, Kind] = {}  # of the live tensors of all snapshots, in the order of a slot

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that every snapshot holds."""
        return tuple(self._kinds)

    @property
    def slot_kinds(self) -> dict[str, Kind]:
        """Of the tensors in a slot, by name."""
        return {name: replace(kind, dtype=self._in_slot(kind.dtype)) for name, kind in self._kinds.items()}

    def why_others(self, live: Mapping[str, Tensor]) -> str | None:
        """How the live tensors differ from those that the snapshots hold; None where nothing is held, or no way."""
        if not self._kinds or self._kinds == (kinds := {name: Kind.of(tensor) for name, tensor in live.items()}):
            return None
        for names, differ in (
            (kinds.keys() - self._kinds.keys(), "new"),
            (self._kinds.keys() - kinds.keys(), "gone"),
            (
                {name for name, kind in self._kinds.items() if kinds.get(name, kind) != kind},
                "of another shape or dtype",
            ),
        ):
            if names:
                more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
                return f"{min(names)!r}{more} {differ}"
        return None  # the same ones in another order: slots go by name

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
        self.write(live, source)
        self.window.add(progress, lr=lr, phase=phase)

    def write(self, live: Mapping[str, Tensor], source: Sequence[Tensor]) -> None:
        """Fill the slot that the window's next snapshot will have."""
        by_name = dict(zip(live, source, strict=True))
        ordered = {name: live[name] for name in self._kinds or live}  # as in the slots before
        store = self.open_store(ordered)
        # only now: a store that has no room must not leave names of snapshots that are not held
        self._kinds = {name: Kind.of(tensor) for name, tensor in ordered.items()}
        store.write(self.window.next_slot(), {name: by_name[name] for name in ordered}, self.slot_dtypes(ordered))

    def merge_(
        self,
        live: Mapping[str, Tensor],
        chosen: Sequence[Snapshot],
        weights: Sequence[float],
        *,
        spread: bool | Mapping[str, float] = False,
    ) -> Spread | None:
        """The weighted sum of snapshots, oldest first, into live tensors of the same names.

        Args:
            live: At least the tensors that snapshots hold, by name.
            chosen: Which snapshots.
            weights: How much of each.
            spread: Also measure the spread; numbers say how much each tensor counts.
        """
        counted = spread if isinstance(spread, bool) else [spread[name] for name in self._kinds]
        return self.open_store().merge_(self._in_order(live), [item.slot for item in chosen], weights, spread=counted)

    def raw_slot(self, live: Mapping[str, Tensor]) -> int | None:
        """The newest slot if it holds the live model bit for bit, so that no copy of raw is needed to restore it.

        By the bits and nothing else: writes through `.data` leave version counters as they are (P31). Where the slot is
        in host memory or on a disk and the model on a device, it is read through once more than the merge reads it; a
        copy on the device would be faster, and take the memory that such a store was chosen to save.
        """
        newest = self.window.newest
        if newest is None or {name: Kind.of(tensor) for name, tensor in live.items()} != self.slot_kinds:
            return None
        return newest.slot if self.open_store().holds(newest.slot, self._in_order(live)) else None

    def restore_raw(self, live: Mapping[str, Tensor], slot: int) -> None:
        """Raw again, from the slot that `raw_slot` named."""
        self.open_store().read_(self._in_order(live), slot)

    def slot_dtypes(self, live: Mapping[str, Tensor]) -> list[torch.dtype]:
        """What each live tensor is in a slot."""
        return [self._in_slot(tensor.dtype) for tensor in live.values()]

    def clear(self) -> None:
        """Forget all snapshots and give their memory back; breaks are remembered."""
        if self._store is not None:
            self._store.clear()
            # chosen anew, of tensors that may be larger or on another device
            self._store = None
        self.window.clear()
        self._kinds = {}

    def open_store(self, live: Mapping[str, Tensor] | None = None) -> Store:
        """Where the slots are; chosen at the first snapshot, of the live tensors."""
        if self._store is None:
            live = live or {}
            sizes = zip(live.values(), self.slot_dtypes(live), strict=True)
            # of this rank's shards, as the live tensors are
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

    def _in_slot(self, parameter: torch.dtype) -> torch.dtype:
        # a parameter without a master is widened too, which loses nothing: files have one dtype before and after
        wide = parameter if self._least is None else torch.promote_types(parameter, self._least)
        return slot_dtype(wide, self._slot_dtype)

    def _in_order(self, live: Mapping[str, Tensor]) -> list[Tensor]:
        return [live[name] for name in self._kinds]
