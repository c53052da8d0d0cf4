"""The open interval of `average: block` as plain values and a durable file, and back. It knows no cadence."""

from collections.abc import Mapping

from torch import Tensor

from pretrain_merge.resume.manifest import SavedBlock
from pretrain_merge.resume.window_files import WindowFiles
from pretrain_merge.window.block_mean import BlockMean, accumulator_dtype


def save(block: BlockMean, files: WindowFiles, step: int) -> SavedBlock:
    """Write the running sum, if there is one.

    Raises:
        CheckpointError: The disk refuses.
    """
    file = None
    if block.num_samples and not block.is_invalid:
        file = files.write(f"block-{step:08d}", dict(zip(block.names, block.sums, strict=True)))
    return SavedBlock(block.num_seen, block.num_samples, not block.is_invalid, file)


def restore(block: BlockMean, saved: SavedBlock, live: Mapping[str, Tensor], files: WindowFiles) -> None:
    """Go on with an open interval.

    Raises:
        CheckpointError: Its file cannot be used.
    """
    sums: dict[str, Tensor] = {}
    if saved.file is not None:
        dtypes = [accumulator_dtype(tensor) for tensor in live.values()]
        read = files.read(saved.file, live, dtypes)
        sums = {name: total.clone() for name, total in zip(live, read, strict=True)}  # not the file's own pages
    block.restore(saved.num_seen, saved.num_samples, is_valid=saved.is_valid, sums=sums)
