"""What may be merged with what: the checks that run before any backend touches memory.

Knows shapes, dtypes, devices and addresses. Does no arithmetic on weights and knows no backend. Everything it lets
through can be merged exactly: tensor `i` of every snapshot has the shape and device of `out[i]`, and no output shares
memory with anything but the input it replaces, element for element.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pretrain_merge.errors import MergeInputError

FLOAT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_merge(out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
    """Refuse every input that `weighted_sum_` could not merge exactly.

    Args:
        out: Tensors to be written.
        snapshots: One sequence per snapshot, oldest first, each as long as `out`.
        coefficients: One number per snapshot.

    Raises:
        MergeInputError: Counts, shapes, dtypes or devices do not fit, or an output shares memory in a way that would
            change an input before it is read.
    """
    _check_counts(out, snapshots, coefficients)
    for i, target in enumerate(out):
        _check_tensor(target, "out", i)
        _check_writable(target, i)
    shapes, devices = [target.shape for target in out], [target.device for target in out]
    for j, snapshot in enumerate(snapshots):
        if not _fits(snapshot, shapes, devices):
            _refuse_snapshot(snapshot, out, j)
    _check_overlap(out, snapshots)


def accumulator_dtype(target: Tensor, sources: Sequence[Tensor]) -> torch.dtype:
    """float64 when the output or any input is float64, else float32."""
    has_double = target.dtype is torch.float64 or any(source.dtype is torch.float64 for source in sources)
    return torch.float64 if has_double else torch.float32


def is_one_block(target: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether element k in memory order is the same element in all of these tensors, without holes.

    True for contiguous tensors and for any dense layout that they all share (a transposed weight, channels-last). Such
    a row can be merged as flat memory, from the addresses alone.
    """
    if target.is_contiguous():
        return all(source.is_contiguous() for source in sources)
    return _is_dense(target) and all(source.stride() == target.stride() for source in sources)


def _check_counts(out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
    if len(snapshots) == 0:
        raise MergeInputError("A merge of 0 snapshots was asked for. At least 1 is needed: take a snapshot first.")
    if len(coefficients) != len(snapshots):
        raise MergeInputError(
            f"{len(coefficients)} coefficients were given for {len(snapshots)} snapshots. Each snapshot needs exactly "
            f"one, oldest first: compute them with `coefficients.compute(kind, {len(snapshots)})`."
        )
    for j, snapshot in enumerate(snapshots):
        if len(snapshot) != len(out):
            raise MergeInputError(
                f"snapshots[{j}] holds {len(snapshot)} tensors and out holds {len(out)}. Every snapshot needs one "
                f"tensor per output: list the parameters of the same model in the same order."
            )


def _fits(snapshot: Sequence[Tensor], shapes: list[torch.Size], devices: list[torch.device]) -> bool:
    """Whether `_refuse_snapshot` would find nothing; in whole lists, as a window of a model is thousands of tensors."""
    return (
        [source.shape for source in snapshot] == shapes
        and [source.device for source in snapshot] == devices
        and FLOAT_DTYPES.issuperset({source.dtype for source in snapshot})
        and all(source.layout is torch.strided for source in snapshot)
        and not any(map(Tensor.is_neg, snapshot))
        and not any(map(_wraps_its_data, set(map(type, snapshot))))
    )


def _refuse_snapshot(snapshot: Sequence[Tensor], out: Sequence[Tensor], j: int) -> None:
    for i, (source, target) in enumerate(zip(snapshot, out, strict=True)):
        _check_tensor(source, f"snapshots[{j}]", i)
        if source.shape != target.shape or source.device != target.device:
            raise MergeInputError(
                f"snapshots[{j}][{i}] is {_describe(source)} and out[{i}] is {_describe(target)}. A merge is "
                f"elementwise: both need the same shape and device. Check that the snapshots come from the same model "
                f"and list their tensors in the same order."
            )


def _check_tensor(tensor: Tensor, collection: str, i: int) -> None:
    if _wraps_its_data(type(tensor)):
        raise MergeInputError(
            f"{collection}[{i}] is a {type(tensor).__name__}, which wraps its data. Plain tensors can be merged: pass "
            f"the local shard (`tensor.to_local()` of a DTensor) or the dequantised weights."
        )
    if not _is_plain(tensor):
        raise MergeInputError(
            f"{collection}[{i}] is {_describe(tensor)}. float32, bfloat16, float16 and float64 tensors with plain "
            f"strided memory can be merged: take other tensors from the live model, and materialise lazy ones."
        )


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.dtype in FLOAT_DTYPES
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_neg()  # its memory holds the negated values
        and not _wraps_its_data(type(tensor))
    )


@cache
def _wraps_its_data(kind: type) -> bool:
    return hasattr(
        kind, "__tensor_flatten__"
    )  # torch's protocol for wrappers: DTensor, quantised weights, jagged tensors


def _check_writable(tensor: Tensor, i: int) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise MergeInputError(
            f"out[{i}] was made in torch.inference_mode() and cannot be changed outside it. Outputs must be ordinary "
            f"tensors: make it under torch.no_grad(), or clone it."
        )
    if not tensor.is_contiguous() and not _has_separate_elements(tensor):
        raise MergeInputError(
            f"out[{i}] is {_describe(tensor)} with strides {tensor.stride()}: several elements share one address. "
            f"Every output element needs its own: use `.contiguous()` instead of an expanded view."
        )


def _check_overlap(out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]]) -> None:
    """An output is written while others are still unread, so it may share memory only with the input it replaces."""
    spans = sorted((*_span(target), i) for i, target in enumerate(out) if target.numel() > 0)
    if not spans:
        return
    # sorted by address: only neighbours can overlap
    for (_, end, i), (start, _, k) in pairwise(spans):
        if start < end:
            raise MergeInputError(
                f"out[{min(i, k)}] and out[{max(i, k)}] share memory. Outputs must be separate: list a tied weight "
                f"once, and merge interleaved views through a copy."
            )
    starts, ends, owners = np.array(spans, dtype=np.int64).T
    sizes = np.array([target.numel() for target in out])
    for j, snapshot in enumerate(snapshots):
        # the usual case in whole arrays: a window is thousands of tensors, and each Python call counts
        if all(map(Tensor.is_contiguous, snapshot)):
            first = np.array(list(map(Tensor.data_ptr, snapshot)), dtype=np.int64)
            end = first + sizes * [source.itemsize for source in snapshot]
        else:
            first, end = np.array([_span(source) for source in snapshot], dtype=np.int64).T
        # Outputs are disjoint: if any reaches into [first, end), the last one that starts before `end` does.
        nearest = np.searchsorted(starts, end) - 1
        shared = (nearest >= 0) & (ends[nearest] > first) & (end > first)
        for i in np.flatnonzero(shared).tolist():
            k = int(owners[nearest[i]])
            # an input that is read where it is written, and at another element, would be read too late
            if k != i or not _is_same_view(snapshot[i], out[i]):
                raise MergeInputError(
                    f"snapshots[{j}][{i}] and out[{k}] share memory without being the same tensor. An output may be "
                    f"an input of its own row, element for element (out[i] is snapshots[j][i]), and nothing else: "
                    f"clone one of them."
                )


def _is_same_view(source: Tensor, target: Tensor) -> bool:
    return source is target or (
        source.data_ptr() == target.data_ptr()
        and source.dtype is target.dtype
        and (source.stride() == target.stride() or (source.is_contiguous() and target.is_contiguous()))
    )


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a tensor reaches."""
    first = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return first, first + tensor.numel() * tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()


def _strides_and_sizes(tensor: Tensor) -> list[tuple[int, int]]:
    """Innermost dimension first, without those of size 1, whose stride means nothing."""
    return sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)


def _has_separate_elements(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in _strides_and_sizes(tensor):
        # this step does not leave what smaller strides reach, so two indices meet
        if stride <= reach and tensor.numel() > 0:
            return False
        reach += stride * (size - 1)
    return True


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in _strides_and_sizes(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    layout = "" if tensor.layout is torch.strided else f" ({str(tensor.layout).removeprefix('torch.')})"
    return f"{dtype} {tuple(tensor.shape)}{layout} on {tensor.device}"
