"""What every store does: keep the tensors of a snapshot in a numbered slot, merge slots, give one back.

A store knows slots and bytes. It knows no steps, no coefficients' meaning and no models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pretrain_merge.files.atomic import Batch
from pretrain_merge.files.snapshot_file import SnapshotFile
from pretrain_merge.kernels.weighted_sum import Spread


class Store(Protocol):
    """The interface of `device`, `host` and `disk`; one contract test runs against all of them."""

    def write(self, slot: int, tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
        """Copy tensors into a slot, each rounded to its dtype; the tensors may change as soon as an optimizer steps."""

    def wait_for_copy(self) -> None:
        """Let the tensors that were written last change from here on, by whatever is not a step of an optimizer."""

    def merge_(
        self,
        out: Sequence[Tensor],
        slots: Sequence[int],
        coefficients: Sequence[float],
        *,
        spread: bool | Sequence[float] = False,
    ) -> Spread | None:
        """`weighted_sum_` of slots, oldest first, into `out`."""

    def read_(self, out: Sequence[Tensor], slot: int) -> None:
        """Copy a slot into `out`."""

    def holds(self, slot: int, tensors: Sequence[Tensor]) -> bool:
        """Whether a slot is bit for bit what these tensors of its dtypes are; one pass that allocates no model."""

    def save(self, slot: int, folder: Path, stem: str, *, batch: Batch | None = None) -> SnapshotFile:
        """Make a durable file of a slot, `<stem>-<checksum>.safetensors`, that stays when the slot is overwritten.

        In a batch it is complete when that is.
        """

    def clear(self) -> None:
        """Give all memory and files back."""


def slot_dtype(parameter: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The dtype that a parameter has in a slot: the chosen one where that is smaller, else the parameter's own."""
    # a wider slot would hold the same bits in more bytes
    return chosen if chosen is not None and chosen.itemsize < parameter.itemsize else parameter
