"""What a merge will write, decided before a byte is: which tensors are merged, and which come from one source.

This module compares names, shapes and dtypes of sources. It reads no tensor.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from pretrain_merge.errors import CheckpointError, ConfigError, MergeInputError, UnsupportedModelError, nearest
from pretrain_merge.offline.safetensors_format import NAMES
from pretrain_merge.offline.tensors import MERGED_DTYPES, Dtype, Kind, Source

OnMissing = Literal["error", "newest"]
_LISTED = 5
_RESERVED = "__metadata__"  # the one name that a header has for itself
_BATCH_NORM = re.compile(r"(.*\.)?running_(mean|var)")
_MASK_BYTES = 1  # per element: what holds quantised weights, unless it is a mask


@dataclass(frozen=True)
class Output:
    """One tensor of the merged checkpoint.

    Attributes:
        kind: As it is written.
        origin: The source it is copied from; None: it is merged from all.
    """

    kind: Kind
    origin: int | None = None


def agree(
    sources: Sequence[Source],
    *,
    dtype: Dtype | None,
    newest: Sequence[str],
    average: Sequence[str],
    on_missing: OnMissing,
    base: Source | None,
) -> dict[str, Output]:
    """What to write, by name, in the order of the newest source.

    Args:
        sources: Oldest first.
        dtype: Of merged tensors; None: that of the sources.
        newest: Patterns (as in fnmatch) of names that are copied from the newest source.
        average: Patterns of running statistics that are merged.
        on_missing: What becomes of a tensor that some sources lack.
        base: Gives what no source has; its origin is the number of sources.

    Raises:
        MergeInputError: Names, shapes or dtypes differ.
        UnsupportedModelError: A tensor cannot be merged by elementwise arithmetic.
    """
    # which of two tied names a file calls the tensor is chance, so all of them are compared
    known = [_with_aliases(source) for source in sources]
    last = known[-1]
    _refuse_other_models(sources, known, on_missing)
    found: dict[str, Output] = {}
    for name, kind in last.items():
        holders = [own[name] for own in known if name in own]
        if name in common_ties(sources):
            continue
        # with on_missing='error' no tensor is short of holders by now
        copied = any(fnmatch(name, pattern) for pattern in newest) or len(holders) < len(sources)
        merged = not copied and kind.dtype in MERGED_DTYPES
        if merged and _BATCH_NORM.fullmatch(name) and not any(fnmatch(name, pattern) for pattern in average):
            raise UnsupportedModelError(
                f"{name} is a running statistic of BatchNorm. The statistics of merged weights are neither the newest "
                f"ones nor their mean. Choose: newest=['*running_*'] or average=['*running_*'] (on the command line "
                f"--newest '*running_*' or --average '*running_*'), or count them anew."
            )
        if merged:
            _refuse_mixed(name, sources, holders, dtype)
        elif not copied:
            _refuse_quantised(name, kind)
        # what is copied keeps its bits, so its dtype
        target = Kind(kind.shape, dtype) if merged and dtype is not None else kind
        found[name] = Output(target, None if merged else len(sources) - 1)
    # behind the sources' own, so that an old base never stands for what was trained
    for name, kind in _with_aliases(base).items() if base is not None else ():
        if name in found or name in common_ties(sources):
            continue
        found[name] = Output(kind, len(sources))
    return found


def refuse_idle(names: Sequence[str], **options: Sequence[str]) -> None:
    """Raise a `ConfigError` where a pattern matches no tensor: what it was meant for would be merged in silence."""
    for option, patterns in options.items():
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                meant = f"; did you mean {near!r}?" if (near := nearest(pattern, names)) else "."
                raise ConfigError(
                    f"{option}: {pattern!r} matches no tensor{meant} Allowed: patterns (as in fnmatch) of names such "
                    f"as {', '.join(map(repr, names[:_LISTED]))}."
                )


def common_ties(sources: Sequence[Source]) -> Mapping[str, str]:
    """Other names of tensors, where all sources agree on them."""
    return {alias: name for alias, name in sources[-1].ties.items() if all(s.ties.get(alias) == name for s in sources)}


def _with_aliases(source: Source) -> dict[str, Kind]:
    return {
        **source.tensors,
        **{alias: source.tensors[name] for alias, name in source.ties.items() if name in source.tensors},
    }


def _refuse_other_models(sources: Sequence[Source], known: Sequence[Mapping[str, Kind]], on_missing: OnMissing) -> None:
    last, newest = known[-1], sources[-1].place
    for source, own in zip(sources, known, strict=True):
        problems = [
            f"{name} is {own[name]} there and {last[name]} here"
            for name in own.keys() & last.keys()
            if own[name].shape != last[name].shape
        ]
        # whatever `on_missing` says: what the newest lacks would be lost, and the merge be no whole model
        problems += [f"{name} is only there" for name in own.keys() - last.keys()]
        remedy = "or the newest if it is the one that is not whole"
        if not problems:  # of what is missing alone; `on_missing` helps against nothing else
            remedy = "or take it from the newest with on_missing='newest'"
        if on_missing == "error":
            problems += [f"{name} is missing" for name in last.keys() - own.keys()]
        if problems:
            # of another model there would be one for each of its tensors
            more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise MergeInputError(
                f"{source.place} does not fit {newest}: {'; '.join(sorted(problems)[:_LISTED])}{more}. A merge needs "
                f"checkpoints of one model, with the same names and shapes. Leave that one out, {remedy}."
            )


def _refuse_mixed(name: str, sources: Sequence[Source], holders: Sequence[Kind], dtype: Dtype | None) -> None:
    for source, kind in zip(sources, holders, strict=True):
        if dtype is None and kind.dtype != holders[-1].dtype:
            raise MergeInputError(
                f"{name} is {kind} in {source.place} and {holders[-1]} in {sources[-1].place}. Sources of several "
                f"dtypes can be merged, but not into an unnamed one: set dtype, for instance to 'float32'."
            )
        if kind.dtype not in MERGED_DTYPES:
            raise MergeInputError(
                f"{name} is {kind} in {source.place}, which cannot be merged. Leave that checkpoint out."
            )


def _refuse_quantised(name: str, kind: Kind) -> None:
    """A mean of scales beside the newest numbers would be no model; a mask is a constant."""
    # of one dimension: tables and counters, which are not weights
    if kind.dtype.itemsize == _MASK_BYTES and kind.dtype.name != "bool" and len(kind.shape) > 1:
        raise UnsupportedModelError(
            f"{name} is {kind}: quantised weights, which cannot be averaged. Merge the checkpoints from before "
            f"quantisation, or name it in newest if it is a constant."
        )


def refuse_negative_moments(coefficients: Sequence[float]) -> None:
    """Raise a `MergeInputError` where second moments could become negative."""
    if min(coefficients) < 0.0:
        raise MergeInputError(
            f"optimizer='average' was asked for with the coefficients {list(coefficients)}: a negative one can make "
            f"second moments negative. Take 'newest' or 'drop'."
        )


def check_writable(outputs: Mapping[str, Output]) -> None:
    """Raise an `UnsupportedModelError` where a tensor is of a dtype that no file of ours can hold."""
    for name, output in outputs.items():
        # torch has more dtypes than safetensors: complex128, some floats of 8 bits
        if output.kind.dtype not in NAMES:
            raise UnsupportedModelError(
                f"{name} is {output.kind}, a dtype that safetensors cannot hold. Allowed: "
                f"{', '.join(dtype.name for dtype in NAMES)}. Leave it out of the checkpoints, or save it as another."
            )


def check_readable(source: Source) -> None:
    """Raise a `CheckpointError` where a checkpoint has nothing to merge."""
    if not source.tensors:
        raise CheckpointError(f"{source.place} holds no tensors. Name a checkpoint of a model.")
    if _RESERVED in {*source.tensors, *source.ties}:
        raise CheckpointError(
            f"{source.place} has a tensor {_RESERVED!r}, which no safetensors file can hold. Rename it."
        )
