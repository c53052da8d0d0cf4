"""What of a module is saved: its state dict as plain tensors, each memory once, and what cannot be written at all.

This module knows names, ties and what safetensors holds. It opens no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.parameters import by_plain_name, is_sharded, reshard
from pretrain_merge.parameters.bits import as_integers
from pretrain_merge.parameters.live import RESERVED
from pretrain_merge.runtime import ranks

EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX  # of what `get_extra_state` returns
TORCH_DTYPES = {  # of safetensors that every version of it reads and writes
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class SavedState:
    """Tensors as they go into files.

    Attributes:
        tensors: By name, contiguous, in dtypes of safetensors; DTensors in shards.
        ties: Names that share the memory of another, and that one.
        as_integers: Dtypes of the tensors that are stored as the integers of their bits.
    """

    tensors: Mapping[str, Tensor]
    ties: Mapping[str, str]
    as_integers: Mapping[str, str]

    @classmethod
    def of(cls, module: nn.Module, prefix: str) -> "SavedState":
        """Of a module as it is now. Collective where it is sharded.

        Raises:
            UnsupportedModelError: A tensor cannot be written.
        """
        state = tensors_of(module, prefix)
        refuse_unwritable(state)
        state, ties = _without_ties(state, sharded=is_sharded(module))
        odd = {name: tensor for name, tensor in state.items() if tensor.dtype not in TORCH_DTYPES.values()}
        return cls(
            {name: as_integers(tensor) if name in odd else tensor for name, tensor in state.items()},
            ties,
            {name: dtype_name(tensor.dtype) for name, tensor in odd.items()},
        )


def tensors_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of a module's state dict, by names without the prefix of a wrapper."""
    reshard(module)  # P18
    state = by_plain_name((name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor))
    return {name.removeprefix(prefix): tensor if is_lazy(tensor) else tensor.detach() for name, tensor in state}


def refuse_unsavable(module: nn.Module) -> None:
    """Say before training what no merged model could be saved with.

    Raises:
        UnsupportedModelError: A tensor cannot be written; names it and the way out.
    """
    refuse_unwritable({name: tensor for name, tensor in tensors_of(module, "").items() if not is_lazy(tensor)})


def refuse_unwritable(state: Mapping[str, Tensor]) -> None:
    """Raise an `UnsupportedModelError` where a tensor is not plain numbers in plain memory."""
    if RESERVED in state:
        raise UnsupportedModelError(
            f"a tensor is called {RESERVED!r}, which is the header's own name in safetensors, the files that merged "
            f"models are saved in. Allowed: any other name. Rename it, or train without `save`."
        )
    for name, tensor in state.items():
        if reason := _why_unwritable(tensor):
            raise UnsupportedModelError(
                f"{name!r} {reason}, and a merged model is saved as safetensors, which hold plain numbers only. "
                f"Register a buffer like it with persistent=False and build it in __init__, keep a frozen base like it "
                f"out of state_dict, or train without `save`."
            )


def dtype_name(dtype: torch.dtype) -> str:
    """As in `float32`."""
    return str(dtype).removeprefix("torch.")


def _why_unwritable(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "is not initialised yet (its module is lazy)"
    if isinstance(tensor, DTensor):
        return "" if tensor.dtype in TORCH_DTYPES.values() else f"is sharded and of dtype {dtype_name(tensor.dtype)}"
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, made of several tensors"
    if tensor.is_quantized:
        return f"is quantised ({dtype_name(tensor.dtype)})"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is {'nested' if tensor.is_nested else dtype_name(tensor.layout)}"  # type: ignore[arg-type]
    return "is on the meta device and holds no values" if tensor.is_meta else ""


def _without_ties(state: Mapping[str, Tensor], *, sharded: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, under its first name (P22), and which other names it has."""
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        # empty tensors have no memory, and would all be ties of each other
        identity = memory(tensor) if tensor.numel() else name
        if first.setdefault(identity, name) != name:
            ties[name] = first[identity]
    if sharded:
        ties = ranks.gather(ties)[0]  # memory tells nothing where a rank's shard is empty, and rank 0 has the most
    # safetensors writes memory, and a conjugate or negated view is one by a flag alone
    plain = {name: tensor.resolve_conj().resolve_neg() for name, tensor in state.items() if name not in ties}
    return {name: tensor.contiguous() for name, tensor in plain.items()}, ties


def memory(tensor: Tensor) -> object:
    """Where it lies and how; the same for names that are tied."""
    own = local(tensor)
    return own.data_ptr(), tensor.shape, own.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
