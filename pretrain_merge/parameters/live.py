"""Rank-local parameters: which tensors of a module are merged, and moving them to and from a snapshot.

This module knows modules and tensors. It knows nothing of when a snapshot is due, where it is stored or how snapshots
are weighted. Everything is local to this rank: merging is elementwise, so shards are all it needs (DESIGN, "shard").
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain_merge.errors import UnsupportedModelError

try:  # a torch built without distributed has no FSDP modules to reshard or to refuse
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
except ImportError:  # pragma: no cover
    FSDPModule = FullyShardedDataParallel = None  # type: ignore[assignment,misc]

_MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN_TYPES = (nn.Parameter, Tensor, DTensor, nn.Buffer)


def mergeable_tensors(
    module: nn.Module, *, merge_buffers: Sequence[str] = (), batch_norm: str = "refuse"
) -> dict[str, Tensor]:
    """The local tensors that snapshots hold, by name: trainable float parameters, each once, and chosen buffers.

    The returned tensors share memory with the module, so writing into them changes the live model. They are contiguous:
    a parameter with other strides (channels last) comes with its dimensions in memory order. FSDP2 modules are
    resharded first (P18). Names are free of the prefixes that `torch.compile` adds (P14).

    Args:
        module: The live model.
        merge_buffers: Patterns (as in fnmatch) of float buffers that are merged like parameters.
        batch_norm: "refuse", "live" or "merge", for running statistics of BatchNorm layers.

    Raises:
        UnsupportedModelError: A parameter cannot be merged exactly, or a pattern matches nothing; names the way out.
    """
    _refuse_fsdp1(module)
    reshard(module)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            local = _local(plain_name(name), parameter)
            # P22: two Parameter objects over one storage are tied as much as one object under two names
            identity = (local.data_ptr(), local.shape, local.stride()) if local.numel() else (name,)
            if identity not in seen:
                seen.add(identity)
                tensors[plain_name(name)] = local
    tensors |= _chosen_buffers(module, merge_buffers, batch_norm)
    if not tensors:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no trainable float parameters, so there is nothing to merge. Set "
            f"requires_grad=True on the parameters that train before fit, or remove the callback."
        )
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name without what `torch.compile` put in.

    >>> plain_name("model._orig_mod.layers.0.weight")
    'model.layers.0.weight'
    """
    return name.replace("_orig_mod.", "")


def is_sharded(module: nn.Module) -> bool:
    """Whether this rank holds only a part of some trainable parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters() if parameter.requires_grad)


def as_shards(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Local tensors as the parts of whole parameters that they are: DTensors over the same memory where sharded.

    Args:
        module: The live model, whose parameters tell how they are sharded.
        tensors: By the names of `mergeable_tensors`, in the shapes of its tensors and any dtype.
    """
    parameters = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    return {name: _as_shard(tensor, parameters.get(name)) for name, tensor in tensors.items()}


def whole_sizes(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[int]:
    """Elements of the whole parameters of which local tensors are parts, in their order."""
    return [tensor.numel() for tensor in as_shards(module, tensors).values()]


def _as_shard(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def reshard(module: nn.Module) -> None:
    """Drop gathered parameters of FSDP2, so that the shards are what the next forward uses (P18)."""
    if FSDPModule is not None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@torch.no_grad()
def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensor by tensor, in one multi-tensor call."""
    torch._foreach_copy_(list(targets), list(sources))


def identities(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Which memory, and how often it was written: equal as long as nobody touched the very same tensors."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite, from one reduction that allocates nothing (`isfinite`: 16.8 copies).

    On a CPU the extremes, which propagate NaN: half a copy in float32, two thirds in 16 bits, where norms take 2 to 13.
    Elsewhere one fused norm of all tensors, and the extremes only where squares of finite values overflow.
    """
    groups: dict[tuple[torch.device, bool], list[Tensor]] = {}
    for tensor in (tensor for tensor in tensors if tensor.numel()):
        groups.setdefault((tensor.device, tensor.dtype == torch.float64), []).append(tensor)
    return all(
        (device.type != "cpu" and _norms_are_finite(group)) or all(map(_extremes_are_finite, group))
        for (device, _), group in groups.items()
    )


def _extremes_are_finite(tensor: Tensor) -> bool:
    lowest, highest = tensor.aminmax()
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


def _norms_are_finite(tensors: list[Tensor]) -> bool:
    # float32: the norm of a finite float16 tensor can exceed what float16 holds; torch refuses it for float64
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return bool(torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).isfinite().all())


def _refuse_fsdp1(module: nn.Module) -> None:
    if FullyShardedDataParallel is not None:
        for name, part in module.named_modules():
            if isinstance(part, FullyShardedDataParallel):
                raise UnsupportedModelError(
                    f"module {name!r} is wrapped in FSDP1 (FullyShardedDataParallel), whose parameters are views of a "
                    f"flat one and move, also with use_orig_params=True. Use FSDP2: fully_shard, and "
                    f"ModelParallelStrategy in a Trainer."
                )


def _local(name: str, tensor: Tensor) -> Tensor:
    inner = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if type(tensor) not in _PLAIN_TYPES or type(inner) not in _PLAIN_TYPES or hasattr(tensor, "ds_id"):
        raise UnsupportedModelError(
            f"parameter {name!r} is a {type(inner).__name__}, whose elements cannot be read and written in place. "
            f"Allowed: plain parameters and DTensor shards. Use FSDP2 (ModelParallelStrategy) instead of FSDP1 or "
            f"DeepSpeed ZeRO-3, and keep quantised parameters frozen (requires_grad=False)."
        )
    if tensor.dtype not in _MERGEABLE_DTYPES:
        raise UnsupportedModelError(
            f"parameter {name!r} has dtype {tensor.dtype}. Allowed: float64, float32, bfloat16, float16. Train it in "
            f"one of these, or freeze it (requires_grad=False)."
        )
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"parameter {name!r} is on the meta device and holds no values. Materialise the model in configure_model."
        )
    with torch.no_grad():  # under grad mode to_local() is an autograd view with a version counter of its own
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        return local if local.is_contiguous() else _in_memory_order(name, local)


def _in_memory_order(name: str, tensor: Tensor) -> Tensor:
    sizes, strides = tensor.shape, tensor.stride()
    ordered = tensor.permute(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], -sizes[dim])))
    if not ordered.is_contiguous():
        raise UnsupportedModelError(
            f"parameter {name!r} has gaps or overlaps in memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}). Make it a tensor of its own with .clone() when the model is built."
        )
    return ordered


def _chosen_buffers(module: nn.Module, patterns: Sequence[str], batch_norm: str) -> Mapping[str, Tensor]:
    statistics = set(_batch_norm_statistics(module))
    if statistics and batch_norm == "refuse":
        raise UnsupportedModelError(
            f"{type(module).__name__} has BatchNorm running statistics ({sorted(statistics)[0]!r} and "
            f"{len(statistics) - 1} more). They belong to the raw weights, and merged weights need others. Choose "
            f"batch_norm='live' (evaluate merged weights with the live statistics) or 'merge' (average them too)."
        )
    buffers = {plain_name(name): buffer for name, buffer in module.named_buffers()}
    for pattern in patterns:
        matched = fnmatch.filter(buffers, pattern)
        if not matched or not all(buffers[name].is_floating_point() for name in matched):
            raise UnsupportedModelError(
                f"merge_buffers: {pattern!r} matches {matched or 'no buffer'}. Allowed: patterns of float buffers, of "
                f"which this model has {[name for name, item in buffers.items() if item.is_floating_point()]}."
            )
    wanted = statistics if batch_norm == "merge" else set()
    wanted |= {name for pattern in patterns for name in fnmatch.filter(buffers, pattern)}
    return {name: _local(name, buffer) for name, buffer in buffers.items() if name in wanted}


def _batch_norm_statistics(module: nn.Module) -> Iterator[str]:
    for prefix, part in module.named_modules():
        # _NormBase: InstanceNorm with track_running_stats keeps the same statistics
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            yield from (plain_name(f"{prefix}.{name}".lstrip(".")) for name in ("running_mean", "running_var"))
