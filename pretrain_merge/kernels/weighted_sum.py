"""The one function of this package that does arithmetic on weights.

A merge is a weighted sum of snapshots, `sum_j c_j theta_j`. This package computes it and nothing else: it knows tensors
and numbers, not where coefficients come from, when snapshots are taken, or where they are stored. Three backends keep
one contract:

- `reference`: plain torch operations in bounded chunks, for every device and layout;
- `cpu`: one compiled pass at memory speed (needs llvmlite, the `fast` extra);
- `cuda`: one Triton kernel for a whole list of tensors.

Compilers are imported when a merge first needs one.
"""

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pretrain_merge.errors import MergeInputError, MissingDependencyError
from pretrain_merge.kernels import reference
from pretrain_merge.kernels.inputs import accumulator_dtype, check_merge, is_one_block
from pretrain_merge.kernels.spread import Spread

__all__ = ["Backend", "Spread", "weighted_sum_"]

Backend = Literal["auto", "reference", "cpu", "cuda"]


@torch.no_grad()
def weighted_sum_(
    out: Sequence[Tensor],
    snapshots: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    *,
    spread: bool | Sequence[float] = False,
    backend: Backend = "auto",
) -> Spread | None:
    """Merge snapshots in place: `out[i] <- round(sum_j coefficients[j] * snapshots[j][i])`.

    Sums in float32 (float64 where the output or an input of the row is float64) and rounds once, to nearest even, to
    the dtype of `out[i]`; only a float64 sum for a 16-bit output passes through float32. NaN and infinities propagate.
    Allocates nothing of the size of the model. Counts as an in-place operation for autograd's version counters.

    Args:
        out: Tensors to be written: float32, bfloat16, float16 or float64, of any shapes and strides. `out[i]` may be
            `snapshots[j][i]` itself; other shared memory is refused. Parameters that require grad are welcome.
        snapshots: N >= 1 sequences, oldest first, each with one tensor per output, of its shape and on its device.
            Dtypes may differ.
        coefficients: N numbers, oldest first. They need not sum to 1 here.
        spread: Also measure, in the same pass, how far the snapshots lie from their unweighted mean. Numbers say how
            much each row counts in it: 1 / n for what n ranks hold alike, so that sums over ranks count it once.
        backend: `auto` takes the fastest one for each row. A backend that is named must be installed and fit the
            device; rows that no kernel can take (strides that differ within a row) still go to the reference.

    Returns:
        The spread over all tensors if it was asked for, else None.

    Raises:
        MergeInputError: The inputs do not fit each other, or not the backend; nothing was written.
        MissingDependencyError: The named backend's compiler is not installed; nothing was written.

    >>> weights = [torch.zeros(2)]
    >>> weighted_sum_(weights, [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 6.0])]], [0.5, 0.5])
    >>> weights
    [tensor([2., 4.])]
    """
    # all of it before the first write: a refused merge has changed nothing
    check_merge(out, snapshots, coefficients)
    multipliers = [float(coefficient) for coefficient in coefficients]
    total = Spread(0.0, 0.0)
    for group, rows in _group_rows(out, snapshots, backend, spread).items():
        targets = [out[i] for i in rows]
        sources = [[snapshot[i] for i in rows] for snapshot in snapshots]
        part = _merge_group(group, targets, sources, multipliers, spread=spread is not False)
        increment_version(targets)  # kernels write through addresses, which autograd cannot see
        if part is not None:
            total = total + part.times(group.share)
    return total if spread is not False else None


class _Merge(Protocol):
    """What a backend is: one function over rows that were checked, all on one device and with one accumulator dtype."""

    def __call__(
        self,
        out: Sequence[Tensor],
        snapshots: Sequence[Sequence[Tensor]],
        coefficients: Sequence[float],
        *,
        double: bool,
        spread: bool,
    ) -> Spread | None: ...


class _Group(NamedTuple):
    """What rows must have in common to be merged by one call.

    Attributes:
        merge: The backend.
        device: Of all tensors.
        double: Accumulate in float64.
        share: How much the rows count in the spread.
        replaces: The outputs are snapshots' own tensors, and the spread is asked for.
    """

    merge: _Merge
    device: torch.device
    double: bool
    share: float
    replaces: bool


def _merge_group(
    group: _Group,
    out: Sequence[Tensor],
    snapshots: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float],
    *,
    spread: bool,
) -> Spread | None:
    if not (spread and group.replaces):
        return group.merge(out, snapshots, coefficients, double=group.double, spread=spread)
    # A kernel may have to measure once more, and would find the merge where the snapshot was.
    measured = reference.measure(snapshots)
    group.merge(out, snapshots, coefficients, double=group.double, spread=False)
    return measured


def _group_rows(
    out: Sequence[Tensor], snapshots: Sequence[Sequence[Tensor]], backend: Backend, spread: bool | Sequence[float]
) -> dict[_Group, list[int]]:
    groups: dict[_Group, list[int]] = {}
    for i, target in enumerate(out):
        sources = [snapshot[i] for snapshot in snapshots]
        merge = _backend_for(target.device.type, backend)
        # kernels walk addresses one after another, and would pair wrong elements
        if not is_one_block(target, sources):
            merge = reference.merge_
        double = accumulator_dtype(target, sources) is torch.float64
        share = 1.0 if isinstance(spread, bool) else spread[i]
        replaces = spread is not False and any(source.data_ptr() == target.data_ptr() for source in sources)
        groups.setdefault(_Group(merge, target.device, double, share, replaces), []).append(i)
    return groups


@cache  # so that the warning comes once
def _backend_for(device: str, backend: Backend) -> _Merge:
    """The named backend, or for `auto` the fastest one that is installed."""
    wanted = {"cpu": "cpu", "cuda": "cuda"}.get(device, "reference") if backend == "auto" else backend
    if wanted not in get_args(Backend):
        raise MergeInputError(f"backend={backend!r} is not one of {', '.join(get_args(Backend))}. Leave it at 'auto'.")
    if wanted == "reference":
        return reference.merge_
    try:
        module = importlib.import_module(f"pretrain_merge.kernels.{wanted}")
    except ImportError as error:
        hint = (
            "Install `pretrain-merge[fast]`." if wanted == "cpu" else "Install triton, which comes with torch for CUDA."
        )
        if backend != "auto":
            raise MissingDependencyError(f"backend={backend!r} cannot be loaded ({error}). {hint}") from error
        warnings.warn(
            f"Merges on {device} run in plain torch, correct but several times slower than memory allows: "
            f"the compiled backend cannot be loaded ({error}). {hint}",
            stacklevel=5,  # the caller of `weighted_sum_`, behind no_grad's own frame
        )
        return reference.merge_
    # raised for a backend that was named only: `auto` asks for one of this device
    if device not in module.DEVICES:
        raise MergeInputError(
            f"backend={backend!r} was asked to merge tensors on {device}; it takes {', '.join(module.DEVICES)}. "
            f"Leave it at 'auto', or move the tensors."
        )
    merge: _Merge = module.merge_
    return merge
