"""Merge checkpoints that are on disk, whatever wrote them, into a merged model that appears whole.

This module knows the order of things: open, compare, plan, stream, publish. What each of them does is in the module of
its name. Nothing is written before everything was compared, and memory does not depend on the size of the model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pretrain_merge.offline import merged_folder, rates, shards
from pretrain_merge.offline.agreement import OnMissing
from pretrain_merge.offline.decision import Decision, Optimizer
from pretrain_merge.offline.options import checked_device, find, find_base, new_folder
from pretrain_merge.offline.partial import PLAN, locked, prepare, publish, removed_if_empty
from pretrain_merge.offline.recipe import ViewLike
from pretrain_merge.offline.shards import LARGEST_FILE, Shard, Written
from pretrain_merge.offline.stream import Streamer, memory
from pretrain_merge.offline.tensors import Source
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger

Progress: TypeAlias = Callable[[int, int], object]
# bytes that a process takes beside what it holds when all checkpoints are open, and its buffers: for the kernel's
# compiler, and for torch where a device needs it
_COMPILER, _TORCH = 100 * 2**20, 300 * 2**20


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        bytes_read: From all sources.
        bytes_written: Of all files.
        files: That will be written.
        merged: Tensors that are sums.
        copied: Tensors that come from one source, with the reason's policy: their names.
        seconds: By rates that were measured on these disks just now; None: not measured.
        peak_memory: Bytes, imports included.
    """

    bytes_read: int
    bytes_written: int
    files: int
    merged: int
    copied: tuple[str, ...]
    seconds: float | None
    peak_memory: int


def merge_checkpoints(
    sources: Sequence[str | Path],
    out: str | Path,
    view: ViewLike = "sma",
    *,
    steps: Sequence[int] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    newest: Sequence[str] = (),
    average: Sequence[str] = (),
    on_missing: OnMissing = "error",
    optimizer: Optimizer = "drop",
    largest_file: int = LARGEST_FILE,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge checkpoints on disk; the result is a folder that `load_merged` and `from_pretrained` read.

    Tensors are streamed in pieces, so memory depends neither on the size of the model nor on the number of sources.
    Sums are in float32 and rounded once. Integer tensors, and what `newest` names, come from the newest source; tensors
    that are equal in all sources stay as they are; tied weights are written once. The folder appears whole or not at
    all; after a kill the same call goes on behind the last finished file.

    Args:
        sources: Files (`.ckpt`, `.pt`, `.bin`, `.safetensors`) or folders (Hugging Face, torch.distributed.checkpoint,
            `window/`, `merged/step-…`), or folders of those; URLs of fsspec too. Sorted by their steps where each has
            one.
        out: The folder to be made.
        view: As in `views` of the configuration ('sma', 'sma4', 'wsm', a mapping with `kind` and parameters), or one
            coefficient for each source in the order in which both are named, summing to 1.
        steps: Of the sources, where neither content nor name says them.
        base: A checkpoint that gives tensors which the sources lack: buffers and frozen weights, where these are
            snapshots of a `window/`.
        dtype: Of merged tensors: 'float32', 'bfloat16', 'float16', 'float64'; None: as they are.
        newest: Patterns (as in fnmatch) of tensors that come from the newest source, unmerged.
        average: Patterns of running statistics of BatchNorm that are merged; without either they are refused.
        on_missing: A tensor that some sources lack is an 'error', or comes from the 'newest'. One that the newest lacks
            is an error.
        optimizer: 'average' also merges the optimizer states of Lightning checkpoints, for `export --to ckpt`; 'newest'
            takes them over; 'drop' leaves them out: what goes on from a merge with its learning rate decaying needs
            none, and what goes on at a constant one should go on from raw weights.
        largest_file: Bytes after which the weights go on in another file.
        device: Where sums are made: 'cpu' or 'cuda'.
        progress: Called with the bytes read so far and those in all.

    Returns:
        The provenance, as in the folder's `provenance.json`: sources, coefficients, the learning-rate decay that they
        emulate, what was copied, checksums.

    Raises:
        CheckpointError: A source cannot be read as plain data, or `out` exists or cannot be written.
        MergeInputError: The sources are not of one model, or one is not finite.
        ConfigError: An option is not one, or does not fit the sources.
    """
    # what is cheap to refuse goes first: opening remote sources takes minutes
    target, place = new_folder(out), checked_device(device)
    decision = Decision.of(
        find(sources), view, steps=steps, base=find_base(base), dtype=dtype, newest=newest, average=average,
        on_missing=on_missing, optimizer=optimizer, largest_file=largest_file,
    )  # fmt: skip
    return _written(decision, target, place, progress)


def plan_merge(
    sources: Sequence[str | Path], out: str | Path, view: ViewLike = "sma", *, device: str = "cpu", **options: Any
) -> MergePlan:
    """What `merge_checkpoints` would do with these arguments; nothing is written but a sample of some MiB for its rate.

    Raises:
        PretrainMergeError: As `merge_checkpoints` would.
    """
    target = new_folder(out)
    checked_device(device)
    options["base"] = find_base(options.get("base"))
    decision = Decision.of(find(sources), view, **options)
    num_read = sum(decision.bytes_read(shard) for shard in decision.shards)
    num_written = sum(shard.num_bytes for shard in decision.shards)
    copied = tuple(name for name, output in decision.outputs.items() if output.origin is not None)
    # beside the folder to be made: that disk is the one that will be written
    resident = rates.resident_memory()
    reading, writing = rates.measure(decision.recipe.sources, target.parent)
    return MergePlan(
        bytes_read=num_read,
        bytes_written=num_written,
        files=len(decision.shards),
        merged=len(decision.outputs) - len(copied),
        copied=copied,
        # both at the same time
        seconds=None if reading is None else max(num_read / reading, num_written / (writing or math.inf)),
        peak_memory=resident + _COMPILER + memory(decision.everyone) + (0 if device == "cpu" else _TORCH),
    )


def merge_sources(sources: Sequence[Source], out: Path, view: ViewLike, **options: Any) -> dict[str, Any]:
    """`merge_checkpoints` of checkpoints that were opened, into a folder that is not there."""
    return _written(Decision.of(sources, view, **options), out, "cpu", None)


def write_scratch(sources: Sequence[Source], folder: Path, view: ViewLike, **options: Any) -> dict[str, Any]:
    """`merge_sources` into a new folder that nobody needs after a crash: nothing is flushed, checked or renamed."""
    decision = Decision.of(sources, view, **options)
    folder.mkdir(parents=True)
    with Streamer(decision.everyone, decision.recipe.coefficients, device="cpu", progress=lambda _: None) as streamer:
        written = {
            shard.file: streamer.write(folder, shard, decision.outputs, is_kept=False) for shard in decision.shards
        }
    about = merged_folder.provenance(decision, written)
    merged_folder.complete(folder, decision, about, write=Path.write_bytes)
    return about


def _written(decision: Decision, out: Path, device: str, progress: Progress | None) -> dict[str, Any]:
    """Write every file, then publish the folder."""
    # beside it, so that its name is given by a rename within one file system
    partial = out.with_name(f".{out.name}.partial")
    with locked(out.with_name(f".{out.name}.lock")):
        with ranks.all_or_none(f"prepare {partial}"):
            if ranks.rank() == 0:
                prepare(partial, decision.identity())
        with removed_if_empty(partial), ranks.all_or_none(f"write {partial}"):
            own = _write(decision, partial, device, progress)
        written = {name: item for of_rank in ranks.gather(own) for name, item in of_rank.items()}
        about = merged_folder.provenance(decision, written)
        # all ranks hear of a failure here, and none goes on with a folder that is not there
        with ranks.all_or_none(f"publish {out}"):
            if ranks.rank() == 0:
                merged_folder.complete(partial, decision, about)
                publish(partial, out, without=[*shards.notes(partial), partial / PLAN])
    return about


def _write(decision: Decision, partial: Path, device: str, progress: Progress | None) -> dict[str, Written]:
    """The files of this rank: every rank takes as many bytes, as far as files allow."""
    # every rank computes the same division, so nothing is sent
    mine = _share(decision.shards, ranks.num_ranks())[ranks.rank()]
    total = sum(decision.bytes_read(shard) for shard in mine)
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    found: dict[str, Written] = {}
    with Streamer(decision.everyone, decision.recipe.coefficients, device=device, progress=count) as streamer:
        for shard in mine:
            # its checksum is counted anew, at the speed of the disk: a loss of power may have left zeros
            before = shards.finished(partial, shard)
            if before is None:
                found[shard.file] = streamer.write(partial, shard, decision.outputs)
            else:
                found[shard.file] = before
                logger.info(f"{partial / shard.file} was finished before and is kept.")
                # the bar counts what need not be read again as read
                count(decision.bytes_read(shard))
    return found


def _share(files: Sequence[Shard], num_ranks: int) -> list[list[Shard]]:
    """Files over ranks, the largest first to whoever has least."""
    shares: list[list[Shard]] = [[] for _ in range(num_ranks)]
    # greedy is within a third of the best division, and files are few and of one size
    for shard in sorted(files, key=lambda shard: -shard.num_bytes):
        min(shares, key=lambda share: sum(item.num_bytes for item in share)).append(shard)
    return shares
