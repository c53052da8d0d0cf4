"""The open interval of `average: block` as plain values and a durable file, and back. It knows no cadence."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain_merge.block_mean import BlockMean, accumulator_dtype
from pretrain_merge.manifest import OpenBlock
from pretrain_merge.snapshots import ReadFile
from pretrain_merge.stores import snapshot_file
from pretrain_merge.stores.slot_file import Layout


def keep(block: BlockMean, folder: Path, step: int) -> OpenBlock:
    """Write the running sum, if there is one.

    Raises:
        CheckpointError: The disk refuses.
    """
    file = None
    if block.num_samples and not block.is_spoiled:
        sums = dict(zip(block.names, block.sums, strict=True))
        layout = Layout.of(sums, [total.dtype for total in block.sums])
        parts = {name: [total] for name, total in sums.items()}
        file = snapshot_file.write(folder, f"block-{step:08d}", layout, parts)
    return OpenBlock(block.num_seen, block.num_samples, not block.is_spoiled, file)


def load(block: BlockMean, kept: OpenBlock, live: Mapping[str, Tensor], read: ReadFile) -> None:
    """Go on with an open interval.

    Raises:
        CheckpointError: Its file cannot be used.
    """
    sums: dict[str, Tensor] = {}
    if kept.file is not None:
        dtypes = [accumulator_dtype(tensor) for tensor in live.values()]
        saved = read(kept.file, Layout.of(live, dtypes))
        for (name, tensor), dtype, total in zip(live.items(), dtypes, saved, strict=True):
            sums[name] = torch.empty_like(tensor, dtype=dtype).copy_(total)
    block.go_on(kept.num_seen, kept.num_samples, is_complete=kept.is_complete, sums=sums)
