"""Which tensors of a live model are merged, and what is refused because it could not be merged exactly.

This module knows modules and tensors. It knows nothing of when a snapshot is due, where it is stored or how snapshots
are weighted. Everything is local to this rank: merging is elementwise, so shards are all it needs (DESIGN, "shard").
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from pretrain_merge.errors import UnsupportedModelError, nearest
from pretrain_merge.parameters.masters import Masters, with_masters
from pretrain_merge.parameters.shards import (
    by_plain_name,
    is_plain,
    local_part,
    refuse_fsdp1,
    reshard,
    unwrapped,
)
from pretrain_merge.tensor_names import plain_name

_MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESERVED = "__metadata__"  # of every safetensors file
_ALL = ("*",)
_NUM_NAMED = 8  # parameters that a message lists


class Trained:
    """The set of tensors that are merged: what trains or once did when this looked, and chosen buffers.

    `requires_grad` at one moment does not define it (P36): a GAN freezes one half while the other steps, and callbacks
    unfreeze layers after training has begun. So what was merged stays merged, and the set only grows.

    Args:
        merge_buffers: Patterns (as in fnmatch) of float buffers that are merged like parameters.
        batch_norm: "refuse", "live" or "merge", for running statistics of BatchNorm layers.
        include: Patterns of parameters that may be merged.
        exclude: Patterns of parameters that are not; one name of a tied parameter is enough.
        masters: Gives what an optimizer keeps of a parameter in float32; None: snapshots hold the parameters.
    """

    def __init__(
        self,
        *,
        merge_buffers: Sequence[str] = (),
        batch_norm: str = "refuse",
        include: Sequence[str] = _ALL,
        exclude: Sequence[str] = (),
        masters: Masters | None = None,
    ) -> None:
        self._merge_buffers, self._batch_norm = merge_buffers, batch_norm
        self._include, self._exclude = include, exclude
        self._masters = masters
        self._names: set[str] = set()
        self._optimizers: tuple[Any, ...] = ()

    def watch(self, module: nn.Module, optimizers: Iterable[Any], *, also: Sequence[str] = ()) -> None:
        """Look when training starts, and remember whose state says what is stepped; and what moves without one.

        Raises:
            UnsupportedModelError: A pattern of `also` matches nothing.
        """
        self._optimizers = tuple(optimizers)
        parameters = _parameters(_parts(module))
        self._look(parameters)
        self.remember(_matching([name for name, _ in parameters], also, (), at="also"))

    def remember(self, names: Iterable[str]) -> None:
        """Parameters that a run before merged."""
        self._names.update(names)

    @torch.no_grad()  # under grad mode to_local() is an autograd view with a version counter of its own
    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The local tensors by name, each once.

        They share memory with the module, so writing into them changes the live model. They are contiguous: a parameter
        with other strides (channels last) comes with its dimensions in memory order. FSDP2 modules are resharded first
        (P18). Names are free of the prefixes that `torch.compile` and DDP add (P14).

        Raises:
            UnsupportedModelError: A tensor cannot be merged exactly, or a pattern matches nothing; names the way out.
        """
        refuse_fsdp1(module)
        reshard(module)
        parts = _parts(module)
        parameters = _parameters(parts)
        self._look(parameters)
        wanted = _matching([name for name, _ in parameters], self._include, self._exclude)
        # by identity: one name is enough for a tied parameter
        left_out = {id(parameter) for name, parameter in parameters if name not in wanted}
        trained = [(name, parameter) for name, parameter in parameters if name in self._names]
        tensors: dict[str, Tensor] = {}
        seen: set[tuple[object, ...]] = set()
        for name, parameter in trained:
            if id(parameter) not in left_out:
                local = _local(name, parameter)
                # P22: two Parameter objects over one storage are tied as much as one object under two names
                identity = (local.data_ptr(), local.shape, local.stride()) if local.numel() else (id(parameter),)
                if identity not in seen:
                    seen.add(identity)
                    _refuse_name(name)
                    tensors[name] = local
        tensors |= _chosen_buffers(module, parts, self._merge_buffers, self._batch_norm)
        if not tensors:
            raise UnsupportedModelError(_why_nothing(module, [name for name, _ in trained]))
        # over all that a merge would write, buffers too
        _refuse_overlaps(tensors)
        return tensors

    def sources(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a snapshot holds of each of `tensors`: the tensors themselves, or the masters kept of them.

        Raises:
            UnsupportedModelError: A master is not all of its parameter.
        """
        if self._masters is None:
            return tensors
        return with_masters(self._masters, dict(_parameters(_parts(module))), tensors)

    def _look(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Remember what requires a gradient now, or has been stepped."""
        # an optimizer of the user's own may have none
        states = [getattr(item, "state", None) for item in self._optimizers]
        stepped = {id(parameter) for state in states if isinstance(state, Mapping) for parameter in state}
        self._names.update(name for name, item in parameters if item.requires_grad or id(item) in stepped)


def mergeable_tensors(module: nn.Module, **options: Any) -> dict[str, Tensor]:
    """What `Trained` with these options finds at a first look."""
    return Trained(**options).tensors(module)


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Submodules by prefix, under all of their names: one walk for all that asks for names, at every snapshot."""
    return list(unwrapped(module).named_modules(remove_duplicate=False))


def _parameters(parts: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    return by_plain_name(
        (f"{prefix}.{key}" if prefix else key, parameter)
        for prefix, part in parts
        # `named_parameters` would walk all modules again
        for key, parameter in part._parameters.items()
        if parameter is not None
    )


def _matching(
    names: Sequence[str], include: Sequence[str], exclude: Sequence[str], *, at: str = "parameters.include"
) -> set[str]:
    for key, patterns in ((at, include), ("parameters.exclude", exclude)):
        for pattern in patterns:
            if pattern != "*" and not fnmatch.filter(names, pattern):
                meant = f"; did you mean {near!r}?" if (near := nearest(pattern, names)) else "."
                raise UnsupportedModelError(
                    f"{key}: {pattern!r} matches no parameter{meant} "
                    f"Allowed: patterns (as in fnmatch) of names such as {', '.join(map(repr, names[:_NUM_NAMED]))}."
                )
    # the usual case, once for each snapshot: no pattern is compared
    if tuple(include) == _ALL and not exclude:
        return set(names)
    included = {name for pattern in include for name in fnmatch.filter(names, pattern)}
    return included - {name for pattern in exclude for name in fnmatch.filter(names, pattern)}


def _refuse_name(name: str) -> None:
    """Names tell tensors apart in the files of a window."""
    if name == RESERVED:
        raise UnsupportedModelError(
            f"a parameter has the name {name!r}, which safetensors keeps for itself: no file can hold it. Allowed: "
            f"any other name. Rename the parameter."
        )


def _why_nothing(module: nn.Module, trained: Sequence[str]) -> str:
    if not trained:
        return (
            f"{type(module).__name__} has no trainable float parameters, so there is nothing to merge. Set "
            f"requires_grad=True on the parameters that train, or train without merging."
        )
    return (
        f"parameters: all {len(trained)} trainable parameters of {type(module).__name__} are left out. Allowed: "
        f"patterns that leave one or more, such as {trained[0]!r}. Narrow `exclude`, or widen `include`."
    )


def _refuse_overlaps(tensors: Mapping[str, Tensor]) -> None:
    """Memory that two tensors share in part, or in two shapes, would be merged twice."""
    spans = [
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in tensors.items()
        if tensor.numel()
    ]
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(spans)):
        if device == other_device and start < end:
            raise UnsupportedModelError(
                f"{name!r} {tuple(tensors[name].shape)} and {other!r} {tuple(tensors[other].shape)} share memory, in "
                f"part or under two shapes, so a merge would write it twice. Allowed: tied parameters of one shape. "
                f"Make one of them a tensor of its own with .clone() when the model is built, or use one Parameter "
                f"and take the other's view of it in forward."
            )


def _local(name: str, tensor: Tensor) -> Tensor:
    if reason := _why_not_mergeable(tensor):
        raise UnsupportedModelError(f"parameter {name!r} {reason}")
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return local if local.is_contiguous() else _in_memory_order(name, local)


def _why_not_mergeable(tensor: Tensor) -> str | None:
    """What a parameter is that is not dense memory of floats, what is allowed, and the way out."""
    kind = type(local_part(tensor))
    # DeepSpeed's mark, which can be seen without DeepSpeed
    if hasattr(tensor, "ds_id"):
        return (
            "is partitioned by DeepSpeed ZeRO-3, so its elements cannot be read and written in place. Allowed: plain "
            "parameters and DTensor shards. Use FSDP2 (ModelParallelStrategy) instead of DeepSpeed ZeRO-3."
        )
    if is_lazy(tensor):
        return (
            f"is a {kind.__name__} of a lazy layer, which has no shape before its first forward. Allowed: parameters "
            f"that are initialised. Run one batch through the module before fit, or give the layer its sizes."
        )
    if tensor.layout is not torch.strided:
        return (
            f"is sparse or packed ({tensor.layout}), so its elements have no fixed place. Allowed: dense parameters. "
            f"Make it dense with .to_dense(), freeze it (requires_grad=False), or leave it out (parameters.exclude)."
        )
    if not is_plain(local_part(tensor)):
        base = kind.__mro__[1].__name__
        return (
            f"is a {kind.__name__}, a subclass of {base}, whose elements may not be what is read and written in place. "
            f"Allowed: plain parameters and DTensor shards (FSDP2). Make it an nn.Parameter, or keep it frozen "
            f"(requires_grad=False), as quantised parameters are."
        )
    if tensor.dtype not in _MERGEABLE_DTYPES:
        return (
            f"has dtype {tensor.dtype}. Allowed: float64, float32, bfloat16, float16. Train it in one of these, or "
            f"freeze it (requires_grad=False)."
        )
    if tensor.is_meta:
        return (
            "is on the meta device and holds no values. Allowed: parameters with memory. Materialise the model in "
            "configure_model."
        )
    return None


def _in_memory_order(name: str, tensor: Tensor) -> Tensor:
    sizes, strides = tensor.shape, tensor.stride()
    # then by size: a dimension of one element may claim any stride
    ordered = tensor.permute(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], -sizes[dim])))
    if not ordered.is_contiguous():
        raise UnsupportedModelError(
            f"parameter {name!r} has gaps or overlaps in memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}). Make it a tensor of its own with .clone() when the model is built."
        )
    return ordered


def _chosen_buffers(
    module: nn.Module, parts: Sequence[tuple[str, nn.Module]], patterns: Sequence[str], batch_norm: str
) -> Mapping[str, Tensor]:
    statistics = set(_batch_norm_statistics(parts))
    if statistics and batch_norm == "refuse":
        raise UnsupportedModelError(
            f"{type(module).__name__} has BatchNorm running statistics ({sorted(statistics)[0]!r} and "
            f"{len(statistics) - 1} more). They belong to the raw weights, and merged weights need others. Choose "
            f"batch_norm='live' (evaluate merged weights with the live statistics) or 'merge' (average them too)."
        )
    if not patterns and batch_norm != "merge":
        return {}
    buffers = dict(by_plain_name(nn.Module.named_buffers(unwrapped(module))))
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


def _batch_norm_statistics(parts: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    for prefix, part in parts:
        # _NormBase: InstanceNorm with track_running_stats keeps the same statistics
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            yield from (plain_name(f"{prefix}.{name}".lstrip(".")) for name in ("running_mean", "running_var"))
