"""The parts of parameters that this rank holds (DESIGN, "shard"): telling them, and what FSDP does with them.

This module knows DTensors and FSDP modules. It knows nothing of which tensors are merged.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.tensor_names import ADDED, plain_name

try:  # a torch built without distributed has no FSDP modules to reshard or to refuse
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
except ImportError:  # pragma: no cover
    FSDPModule = FullyShardedDataParallel = None  # type: ignore[assignment,misc]

_PLAIN_TYPES = (nn.Parameter, Tensor, nn.Buffer)
# name of the module inside, and class of the wrapper: of torch.compile (P14) and of Fabric
_WRAPPERS = {"_orig_mod": "OptimizedModule", "_forward_module": "_FabricModule"}


def by_plain_name(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Tensors by their names without what `torch.compile` and Fabric put in.

    Raises:
        UnsupportedModelError: That is one name for two of them, of which only one would be merged or saved.
    """
    found: dict[str, Tensor] = {}
    plain = [(plain_name(name), tensor) for name, tensor in named]
    for name, tensor in plain:
        if found.setdefault(name, tensor) is not tensor:
            raise UnsupportedModelError(
                f"two tensors are both called {name!r} without what torch.compile and Fabric put into names "
                f"({', '.join(ADDED)}). Allowed: names that differ without these. Rename the submodule that bears "
                f"such a name."
            )
    return plain


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of DDP, `torch.compile` and Fabric, so that names are those of whichever a loop passes on."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def named_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, whatever the class makes of its own method: some list only what an optimizer is to have."""
    return nn.Module.named_parameters(module)


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and every buffer once, past methods of the class's own."""
    named = chain(named_parameters(module), nn.Module.named_buffers(module))
    return [tensor for _, tensor in named]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its shard, else the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but dense memory, which can be read and written in place."""
    return type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided


def is_sharded(module: nn.Module) -> bool:
    """Whether this rank holds only a part of some parameters."""
    return any(isinstance(parameter, DTensor) for _, parameter in named_parameters(module))


def as_shards(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Local tensors as the parts of whole parameters that they are: DTensors over the same memory where sharded.

    Args:
        module: The live model, whose parameters tell how they are sharded.
        tensors: By the names of `mergeable_tensors`, in the shapes of its tensors and any dtype.
    """
    parameters = {plain_name(name): parameter for name, parameter in named_parameters(unwrapped(module))}
    return {name: _as_shard(tensor, parameters.get(name)) for name, tensor in tensors.items()}


def whole_sizes(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[int]:
    """Elements of the whole parameters of which local tensors are parts, in their order."""
    return [tensor.numel() for tensor in as_shards(module, tensors).values()]


def reshard(module: nn.Module) -> None:
    """Drop gathered parameters of FSDP2, so that the shards are what the next forward uses (P18)."""
    if FSDPModule is not None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def refuse_fsdp1(module: nn.Module) -> None:
    """Raise `UnsupportedModelError` where a part of the module is wrapped in FSDP1 (P19)."""
    if FullyShardedDataParallel is not None:
        for name, part in module.named_modules():
            if isinstance(part, FullyShardedDataParallel):
                raise UnsupportedModelError(
                    f"module {name!r} is wrapped in FSDP1 (FullyShardedDataParallel), whose parameters are views of a "
                    f"flat one and move, also with use_orig_params=True. Use FSDP2: fully_shard, and "
                    f"ModelParallelStrategy in a Trainer."
                )


def _inside(wrapper: nn.Module) -> nn.Module | None:
    if isinstance(wrapper, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return wrapper._modules["module"]
    children = wrapper._modules  # not getattr, which Fabric's wrapper passes on to the module inside
    # by class as well: what a user gave such a name is a part of the model beside others
    kinds = {kind.__name__ for kind in type(wrapper).__mro__}
    return next((children[name] for name, kind in _WRAPPERS.items() if name in children and kind in kinds), None)


def _as_shard(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
