"""The open interval of `average: block` as plain values and a durable file, and back. It knows no cadence."""

from collections.abc import Mapping

from torch import Tensor

from pretrain_merge.resume.manifest import OpenBlock
from pretrain_merge.resume.window_files import WindowFiles
from pretrain_merge.window.block_mean import BlockMean, accumulator_dtype


def keep(block: BlockMean, files: WindowFiles, step: int) -> OpenBlock:
    """Write the running sum, if there is one.

    Raises:
        CheckpointError: The disk refuses.
    """
    file = None
    if block.num_samples and not block.is_spoiled:
        file = files.write(f"block-{step:08d}", dict(zip(block.names, block.sums, strict=True)))
    return OpenBlock(block.num_seen, block.num_samples, not block.is_spoiled, file)


def load(block: BlockMean, kept: OpenBlock, live: Mapping[str, Tensor], files: WindowFiles) -> None:
    """Go on with an open interval.

    Raises:
        CheckpointError: Its file cannot be used.
    """
    sums: dict[str, Tensor] = {}
    if kept.file is not None:
        dtypes = [accumulator_dtype(tensor) for tensor in live.values()]
        saved = files.read(kept.file, live, dtypes)
        sums = {name: total.clone() for name, total in zip(live, saved, strict=True)}  # not the file's own pages
    block.go_on(kept.num_seen, kept.num_samples, is_complete=kept.is_complete, sums=sums)
