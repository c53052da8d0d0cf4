"""Tensors as rows of the tables that compiled kernels take. Knows torch's dtypes and addresses; knows no kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain_merge.kernels.tables import CODES, Table, address_table

_CODE_OF = {getattr(torch, name): code for name, code in CODES.items()}


def table_of(out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]]) -> Table:
    """The address table of tensors that were checked: each row one block of memory."""
    rows = zip(out, *snapshots, strict=True)
    return address_table([(tensor.data_ptr(), _CODE_OF[tensor.dtype]) for tensor in row] for row in rows)


def sizes_of(out: Sequence[Tensor]) -> list[int]:
    """Elements of each."""
    return [tensor.numel() for tensor in out]
