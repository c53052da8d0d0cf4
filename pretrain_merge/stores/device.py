"""Slots beside the live parameters, on their devices: nothing to move, and the fastest merge."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge import parameters
from pretrain_merge.files import snapshot_file
from pretrain_merge.files.atomic import Batch
from pretrain_merge.files.layout import Layout
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.kernels.weighted_sum import Spread, weighted_sum_


class DeviceStore:
    """One tensor per live tensor and slot, of its shape, strides and device.

    A slot is allocated when it is first written, so a run that ends early never pays for the whole window.
    """

    def __init__(self) -> None:
        self._slots: dict[int, list[Tensor]] = {}  # by number; tensors in the order of `_names`
        self._names: tuple[str, ...] = ()  # of the live tensors that were written last; a file lists them

    def write(self, slot: int, tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
        """Copy tensors into a slot, in one multi-tensor call."""
        self._names = tuple(tensors)
        if slot not in self._slots:
            self._slots[slot] = [
                # strides kept: a transposed weight and its slot are one block of memory, which kernels can take
                torch.empty_like(tensor, dtype=dtype, requires_grad=False)
                for tensor, dtype in zip(tensors.values(), dtypes, strict=True)
            ]
        parameters.copy_(self._slots[slot], list(tensors.values()))

    def wait_for_copy(self) -> None:
        """Nothing to wait for: whatever comes next on the device comes after the copy."""

    def merge_(
        self,
        out: Sequence[Tensor],
        slots: Sequence[int],
        coefficients: Sequence[float],
        *,
        spread: bool | Sequence[float] = False,
    ) -> Spread | None:
        """`weighted_sum_` of slots, oldest first, into `out`."""
        return weighted_sum_(out, [self._slots[slot] for slot in slots], coefficients, spread=spread)

    def read_(self, out: Sequence[Tensor], slot: int) -> None:
        """Copy a slot into `out`."""
        parameters.copy_(out, self._slots[slot])

    def holds(self, slot: int, tensors: Sequence[Tensor]) -> bool:
        """Whether a slot is bit for bit what these tensors of its dtypes are."""
        return parameters.all_same_bits(tensors, self._slots[slot])

    def save(self, slot: int, folder: Path, stem: str, *, batch: Batch | None = None) -> SnapshotFile:
        """Write a slot to a file.

        Raises:
            CheckpointError: The disk refuses.
        """
        tensors = dict(zip(self._names, self._slots[slot], strict=True))
        layout = Layout.of(tensors, [tensor.dtype for tensor in tensors.values()])
        return snapshot_file.write(
            folder, stem, layout, {name: [tensor] for name, tensor in tensors.items()}, batch=batch
        )

    def clear(self) -> None:
        """Give the memory of all slots back."""
        self._slots.clear()
