"""Merge checkpoints that are on disk, whatever wrote them, into a merged model that appears whole.

This module knows the order of things: open, compare, plan, stream, publish. What each of them does is in the module of
its name. Nothing is written before everything was compared, and memory does not depend on the size of the model.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain_merge._version import __version__
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files import atomic
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.merged_models.provenance import FORMAT, write_provenance
from pretrain_merge.offline import agreement, rates, recognise, shards
from pretrain_merge.offline.agreement import OnMissing, Output
from pretrain_merge.offline.files import Files, is_remote, size_of
from pretrain_merge.offline.partial import fingerprint, locked, prepare, publish, removed_if_empty
from pretrain_merge.offline.recipe import Recipe, ViewLike, make_recipe
from pretrain_merge.offline.shards import LARGEST_FILE, Shard, Written
from pretrain_merge.offline.stream import BUFFERS, Streamer
from pretrain_merge.offline.tensors import MERGED_DTYPES, Kind, Source
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger

Optimizer = Literal["drop", "newest", "average"]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MERGED_DTYPES}
_IMPORTS = 280 * 2**20  # bytes that torch and the compiled kernel take before the first tensor


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
    progress: Callable[[int, int], object] | None = None,
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
        on_missing: A tensor that some sources lack is an 'error', or comes from the 'newest', which decides what there
            is.
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
    job = _Job.of(
        _found(sources), local_path(out), view, steps=steps, base=_one(base), dtype=dtype, newest=newest,
        average=average, on_missing=on_missing, optimizer=optimizer, largest_file=largest_file,
    )  # fmt: skip
    return job.run(_device(device), progress)


def plan_merge(
    sources: Sequence[str | Path], out: str | Path, view: ViewLike = "sma", *, device: str = "cpu", **options: Any
) -> MergePlan:
    """What `merge_checkpoints` would do with these arguments; nothing is written but a sample of some MiB for its rate.

    Raises:
        PretrainMergeError: As `merge_checkpoints` would.
    """
    _device(device)
    options["base"] = _one(options.get("base"))
    return _Job.of(_found(sources), local_path(out), view, **options).plan()


def merge_sources(sources: Sequence[Source], out: Path, view: ViewLike, **options: Any) -> dict[str, Any]:
    """`merge_checkpoints` of checkpoints that were opened."""
    return _Job.of(sources, out, view, **options).run(torch.device("cpu"), None)


@dataclass(frozen=True)
class _Job:
    """A merge with everything decided.

    Attributes:
        recipe: What is merged.
        base: Gives what the sources lack.
        outputs: Every tensor that is written.
        shards: Over which files.
        policy: Options that decide what is written, for provenance.
        out: The folder.
    """

    recipe: Recipe
    base: Source | None
    outputs: Mapping[str, Output]
    shards: tuple[Shard, ...]
    policy: Mapping[str, Any]
    out: Path

    @classmethod
    def of(
        cls, sources: Sequence[Source], out: Path, view: ViewLike, *, steps: Sequence[int] | None = None,
        base: Source | None = None, dtype: str | None = None, newest: Sequence[str] = (),
        average: Sequence[str] = (), on_missing: OnMissing = "error", optimizer: Optimizer = "drop",
        largest_file: int = LARGEST_FILE,
    ) -> "_Job":  # fmt: skip
        if os.path.lexists(out):
            raise CheckpointError(f"{out} exists and is never overwritten. Move it away, or write to another folder.")
        for option, patterns in (("newest", newest), ("average", average)):
            if isinstance(patterns, str):  # each of its letters would be a pattern
                raise ConfigError(f"{option}: {patterns!r} is one text. Give a list of patterns: [{patterns!r}].")
        _refuse_unknown("dtype", dtype, (None, *_DTYPES))
        _refuse_unknown("on_missing", on_missing, ("error", "newest"))
        _refuse_unknown("optimizer", optimizer, ("drop", "newest", "average"))
        if not largest_file > 0:
            raise ConfigError(f"largest_file is {largest_file}; it must be above 0 bytes. Leave it at its default.")
        if not sources:
            raise ConfigError("sources: no checkpoint was named. Name at least one file or folder.")
        recipe = make_recipe(sources, view, steps)
        for source in recipe.sources:
            agreement.check_readable(source)
        outputs = agreement.agree(
            recipe.sources, dtype=None if dtype is None else _DTYPES[dtype], newest=newest, average=average,
            on_missing=on_missing, base=base,
        )  # fmt: skip
        states = _optimizer_outputs(recipe, optimizer)
        divided = shards.divide({name: output.kind for name, output in outputs.items()}, largest_file)
        if states:
            divided += shards.divide({name: item.kind for name, item in states.items()}, largest_file, "optimizer")
        policy = {
            "dtype": dtype, "newest": list(newest), "average": list(average), "on_missing": on_missing,
            "optimizer": optimizer,
        }  # fmt: skip
        return cls(recipe, base, outputs | states, tuple(divided), policy, out.absolute())

    def plan(self) -> MergePlan:
        """Sizes by arithmetic, seconds by rates."""
        num_read = sum(self._bytes_read(name, output) for name, output in self.outputs.items())
        num_written = sum(shard.num_bytes for shard in self.shards)
        copied = tuple(name for name, output in self.outputs.items() if output.origin is not None)
        reading, writing = rates.measure(self.recipe.sources, self.out.parent)
        return MergePlan(
            bytes_read=num_read,
            bytes_written=num_written,
            files=len(self.shards),
            merged=len(self.outputs) - len(copied),
            copied=copied,
            # both at the same time
            seconds=None if reading is None else max(num_read / reading, num_written / (writing or math.inf)),
            peak_memory=_IMPORTS + BUFFERS,
        )

    def run(self, device: torch.device, progress: Callable[[int, int], object] | None) -> dict[str, Any]:
        """Write every file, then publish the folder."""
        partial = self.out.with_name(f".{self.out.name}.partial")
        with locked(self.out.with_name(f".{self.out.name}.lock")):
            with ranks.all_or_none(f"prepare {partial}"):
                if ranks.rank() == 0:
                    prepare(partial, self._identity())
            with removed_if_empty(partial), ranks.all_or_none(f"write {partial}"):
                own = self._write(partial, device, progress)
            written = {name: item for of_rank in ranks.gather(own) for name, item in of_rank.items()}
            about = self._provenance(written)
            with ranks.all_or_none(f"publish {self.out}"):
                if ranks.rank() == 0:
                    self._finish(partial, about)
                    publish(partial, self.out)
        return about

    def _write(
        self, partial: Path, device: torch.device, progress: Callable[[int, int], object] | None
    ) -> dict[str, Written]:
        """The files of this rank: every rank takes as many bytes, as far as files allow."""
        mine = _share(self.shards, ranks.num_ranks())[ranks.rank()]
        total = sum(self._bytes_read(name, self.outputs[name]) for shard in mine for name in shard.kinds)
        done = 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        everyone = [*self.recipe.sources, *([self.base] if self.base is not None else [])]
        found: dict[str, Written] = {}
        with Streamer(everyone, self.recipe.coefficients, device=device, progress=count) as streamer:
            for shard in mine:
                before = shards.finished(partial, shard)
                if before is None:
                    found[shard.file] = streamer.write(partial, shard, self.outputs)
                else:
                    found[shard.file] = before
                    logger.info(f"{partial / shard.file} was finished before and is kept.")
                    count(sum(self._bytes_read(name, self.outputs[name]) for name in shard.kinds))
        return found

    def _identity(self) -> dict[str, Any]:
        """What must be the same for finished files to be kept: the sources, as their files are now, and the recipe."""
        everyone = [*self.recipe.sources, *([self.base] if self.base is not None else [])]
        files = {file: fingerprint(file) for source in everyone for file in source.files}
        names = hashlib.sha256(
            repr([(name, str(item.kind), item.origin) for name, item in self.outputs.items()]).encode()
        )
        layout = [(shard.file, shard.num_bytes) for shard in self.shards]
        about = [__version__, list(self.recipe.coefficients), dict(self.policy), names.hexdigest(), layout]
        return {"files": files, "about": about}

    def _finish(self, partial: Path, about: Mapping[str, Any]) -> None:
        for stem in ("model", "optimizer"):
            of_stem = [shard for shard in self.shards if shard.file.startswith(stem)]
            if len(of_stem) > 1:
                atomic.write(partial / shards.INDEX.replace("model", stem), shards.index_of(of_stem))
        newest = self.recipe.sources[-1]
        with Files() as files:
            for companion in newest.companions:
                content = files.read(companion, 0, size_of(companion) or 0)
                atomic.write(partial / companion.rpartition("/")[2], content)
        write_provenance(partial, about)

    def _provenance(self, written: Mapping[str, Written]) -> dict[str, Any]:
        newest = self.recipe.sources[-1]
        spread = Spread(
            math.fsum(written[shard.file].distance for shard in self.shards if shard.file.startswith("model")),
            math.fsum(written[shard.file].norm for shard in self.shards if shard.file.startswith("model")),
        )
        copied = {name: item.origin for name, item in self.outputs.items() if item.origin is not None}
        places = [source.place for source in self.recipe.sources] + [self.base.place if self.base else ""]
        dtypes = {str(item.kind.dtype).removeprefix("torch.") for item in self.outputs.values()}
        inherited = {key: newest.about[key] for key in ("samples", "tokens", "prefix", "model") if key in newest.about}
        return {
            "model": "",
            "prefix": "",
            "samples": 0,
            "tokens": 0,
            **inherited,
            **self.recipe.to_plain(),
            "format": FORMAT,
            "step": newest.step or 0,
            "sources": [_described(source) for source in self.recipe.sources],
            "base": self.base.place if self.base else None,
            "spread": spread.relative_rms,
            "policy": dict(self.policy),
            "copied": {name: places[origin] for name, origin in sorted(copied.items())},
            "ties": dict(agreement.common_ties(self.recipe.sources)),
            "dtypes": sorted(dtypes),
            "as_integers": {},
            "files": {name: [item.num_bytes, item.crc32] for name, item in sorted(written.items())},
            "versions": {"pretrain-merge": __version__, "torch": version("torch")},
        }

    def _bytes_read(self, name: str, output: Output) -> int:
        if output.origin is not None:
            return output.kind.num_bytes
        return sum(_stored(source, name).num_bytes for source in self.recipe.sources)


def _described(source: Source) -> dict[str, Any]:
    plain: dict[str, Any] = {"place": source.place, "format": source.format, "step": source.step}
    return plain | ({"provenance": dict(source.about)} if source.about else {})


def _stored(source: Source, name: str) -> Kind:
    return source.tensors.get(source.ties.get(name, name)) or source.optimizer[name]


def _optimizer_outputs(recipe: Recipe, optimizer: Optimizer) -> dict[str, Output]:
    if optimizer == "drop":
        return {}
    sources = recipe.sources
    if not all(source.optimizer for source in sources):
        lacking = next(source.place for source in sources if not source.optimizer)
        raise ConfigError(
            f"optimizer={optimizer!r} needs Lightning checkpoints with optimizer states, and {lacking} has none. Leave "
            f"it at 'drop'."
        )
    if optimizer == "average":
        agreement.refuse_negative_moments(recipe.coefficients)
        of_states = [replace(source, tensors=source.optimizer, ties={}) for source in sources]
        # counters of steps, which some optimizers keep as floats, are of the newest
        return agreement.agree(of_states, dtype=None, newest=["*/step"], average=["*"], on_missing="error", base=None)
    return {name: Output(kind, len(sources) - 1) for name, kind in sources[-1].optimizer.items()}


def _share(files: Sequence[Shard], num_ranks: int) -> list[list[Shard]]:
    """Files over ranks, the largest first to whoever has least."""
    shares: list[list[Shard]] = [[] for _ in range(num_ranks)]
    for shard in sorted(files, key=lambda shard: -shard.num_bytes):
        min(shares, key=lambda share: sum(item.num_bytes for item in share)).append(shard)
    return shares


def _device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is not a device. Allowed: 'cpu', 'cuda', 'cuda:1'.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} is not there on this machine. Leave it at 'cpu'.")
    return chosen


def local_path(out: str | Path) -> Path:
    """Where a result goes.

    Raises:
        ConfigError: That is a URL.
    """
    if is_remote(str(out)):
        raise ConfigError(f"out: {out} is a URL. Results are written to a local folder: name one, and copy it there.")
    return Path(out)


def _found(places: Sequence[str | Path]) -> list[Source]:
    return recognise.find([places] if isinstance(places, str | Path) else places)


def _one(place: str | Path | None) -> Source | None:
    return None if place is None else recognise.find_one(place)


def _refuse_unknown(option: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option}: {value!r} is not known. Allowed: {', '.join(map(repr, allowed))}.")
