"""Where the parameters of a module are, so that each comes back to its place: the same object, in the same memory.

Optimizers, CUDA graphs and FSDP hold on to Parameter objects and to their memory. An evaluator may exchange either
(P33): `double()` and `float()` after it, `.cpu()` and `.cuda()`, `p.data = q`, `load_state_dict(assign=True)`. This
module knows objects and memory. It knows no values: what is in the memory is the caller's business.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.tensor import DTensor

from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.parameters.shards import all_tensors, is_plain, local_part, reshard, unwrapped
from pretrain_merge.tensor_names import plain_name


class _Place(NamedTuple):
    """One parameter or buffer.

    Attributes:
        name: In the whole module.
        owner: The `_parameters` or `_buffers` of its submodule.
        key: Its name there.
        tensor: The object.
        memory: An alias of its memory, with a version counter of its own; of the local shard. None for tensors that are
            not plain memory, which are frozen or they would have been refused.
        num_bytes: Of that memory's storage.
    """

    name: str
    owner: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    memory: Tensor | None
    num_bytes: int


class Places:
    """Objects and memory of all parameters, and of chosen buffers, as they are now.

    Args:
        module: The live model; FSDP2 modules are resharded (P18).
        names: Of the tensors that will be written. Buffers that are not among them are left alone.
    """

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        reshard(module)
        self._module = module = unwrapped(module)
        self._names = frozenset(names)
        self._places = [place for place in _all_places(module) if _is_parameter(place) or place.name in self._names]

    def put_back(self) -> None:
        """Every parameter is the object that it was, in the memory that it had, whatever is in there.

        Raises:
            UnsupportedModelError: Some cannot be put back; all others were.
        """
        reshard(self._module)
        failed = [place.name for place in self._places if not _put_back(place)]
        present = set(map(id, all_tensors(self._module)))
        # a parametrization moves the object elsewhere in the module, which is as good a place; a copy of it is none
        failed += [place.name for place in self._places if id(place.tensor) not in present]
        if failed:
            raise UnsupportedModelError(
                f"parameter {failed[0]!r} and {len(failed) - 1} more were replaced while merged weights were in the "
                f"model, and training would go on from other ones than the optimizer has. Allowed in an evaluation: to "
                f"read the weights, and to write them or exchange their memory (p.data). Work on a copy of the module "
                f"(copy.deepcopy), or undo the change before the evaluation ends."
            )

    @contextmanager
    def versions_kept(self) -> Iterator[None]:
        """Version counters are afterwards what they were before, for whoever puts the same bits back.

        A graph that is kept alive across batches checks them, and would refuse weights that went and came back.
        """
        with ExitStack() as stack:
            for tensor in (part for place in self._places if place.name in self._names for part in _counters(place)):
                stack.enter_context(_unsafe_preserve_version_counter(tensor))
            yield


def _all_places(module: nn.Module) -> Iterator[_Place]:
    for prefix, part in module.named_modules():
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    name = plain_name(f"{prefix}.{key}" if prefix else key)
                    local = local_part(tensor)
                    memory = local.data if is_plain(local) else None
                    num_bytes = memory.untyped_storage().nbytes() if memory is not None else 0
                    yield _Place(name, owner, key, tensor, memory, num_bytes)


def _is_parameter(place: _Place) -> bool:
    return isinstance(place.tensor, nn.Parameter)


def _counters(place: _Place) -> tuple[Tensor, ...]:
    """The tensors whose version counters a write raises: of a DTensor its own, and that of its shard."""
    local = local_part(place.tensor)
    return (place.tensor,) if local is place.tensor else (place.tensor, local)


def _put_back(place: _Place) -> bool:
    """One parameter; False where that cannot be done."""
    # not `get`: a scripted module's parameters are a mapping of C++'s, which has none
    if place.key in place.owner and place.owner[place.key] is not place.tensor:
        place.owner[place.key] = place.tensor
    if place.memory is None:
        return True
    if place.memory.untyped_storage().nbytes() < place.num_bytes:  # freed by `resize_(0)`: whoever writes would crash
        place.memory.untyped_storage().resize_(place.num_bytes)
    if _is_in(local_part(place.tensor), place.memory):
        return True
    if isinstance(place.tensor, DTensor):
        return False  # FSDP2 keeps views of the shard's memory that nobody else can set
    try:
        place.tensor.data = place.memory
    except RuntimeError:  # became a kind of tensor that cannot be told to be dense again
        return False
    return True


def _is_in(local: Tensor, memory: Tensor) -> bool:
    if not is_plain(local) or (local.dtype, local.device) != (memory.dtype, memory.device):
        return False
    return (local.data_ptr(), local.shape, local.stride()) == (memory.data_ptr(), memory.shape, memory.stride())
