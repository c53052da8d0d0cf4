"""A tensor's bits, whatever it is: copied, compared and written back.

This module knows layouts (strided, expanded, sparse, nested), dtypes that torch itself can neither copy nor compare
(8 bits and fewer), quantised and conjugate tensors, and subclasses made of other tensors. It knows no models. NaN
equals NaN of the same bits, and 0.0 is not -0.0: what is asked for is the same memory, not the same number.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)


@torch.no_grad()
def copy_of(tensor: Tensor) -> Tensor:
    """A tensor of the same kind and bits that shares no memory with it.

    Args:
        tensor: Of any layout, dtype, size and device. One that is not initialised yet (`LazyLinear`) has nothing to
            copy and is returned as it is.
    """
    if is_lazy(tensor):
        return tensor
    if is_traceable_wrapper_subclass(tensor):  # DTensor, jagged nested tensors, quantised weights of torchao
        names, context = tensor.__tensor_flatten__()
        inner = {name: copy_of(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, _strides(tensor))
    plain = _plain(tensor)
    if not _is_dense(plain):
        return plain.clone()
    whole = plain.resolve_conj().resolve_neg()
    if whole is not plain:  # resolving copied it
        return whole
    return from_integers(as_integers(_written_once(plain)).clone(), plain.dtype).expand(plain.shape)


@torch.no_grad()
def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one kind and shape and hold the same bits; where they lie does not matter."""
    if is_lazy(a) or is_lazy(b):
        return a is b
    if is_traceable_wrapper_subclass(a) or is_traceable_wrapper_subclass(b):
        # not their own shapes: a jagged one is of another symbolic size than its copy
        if type(a) is not type(b):
            return False
        names, _ = a.__tensor_flatten__()
        return names == b.__tensor_flatten__()[0] and all(same_bits(getattr(a, k), getattr(b, k)) for k in names)
    a, b = _plain(a), _plain(b)
    if (a.dtype, a.layout, a.is_quantized, a.is_nested) != (b.dtype, b.layout, b.is_quantized, b.is_nested):
        return False
    if not _is_dense(a):
        own, other = list(_parts(a)), list(_parts(b))
        return len(own) == len(other) and all(map(same_bits, own, other))
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return a.shape == b.shape and a.is_meta and b.is_meta
    return torch.equal(as_integers(a), as_integers(b.to(a.device)))


@torch.no_grad()
def write_back(tensor: Tensor, copy: Tensor) -> None:
    """Give a tensor the bits of a copy, in its own memory where that has the copy's kind and size.

    Args:
        tensor: What is written.
        copy: What `copy_of` gave for it, before its values, size, dtype or pattern of non-zeros changed. It stays the
            caller's own: the tensor shares no memory with it afterwards.

    Raises:
        ValueError: Elements of the tensor share memory, and the copy has different values for them.
    """
    if tensor is copy:
        return
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            write_back(getattr(tensor, name), getattr(copy, name))
        return
    target, source = _plain(tensor), _plain(copy)
    is_alike = _is_alike(target, source)
    if is_alike and _is_dense(target):
        _write_dense(target, source)
    elif is_alike or target.layout in _COMPRESSED:
        with torch._C.DisableTorchFunctionSubclass():  # not into `target`, whose pattern and scale are its own
            if not is_alike:
                tensor.resize_as_sparse_(source)
            tensor.copy_(source)
    else:
        tensor.data = copy_of(source)  # not resize_: it would grow a view into its neighbours' memory


def _write_dense(target: Tensor, source: Tensor) -> None:
    # a view that is conjugate or negative holds other bits than it shows
    bare, shown = (target.conj(), source.conj()) if target.is_conj() else (target, source)
    if target.is_neg():
        bare, shown = torch._neg_view(bare), torch._neg_view(shown)
    once = _written_once(bare)
    values = shown.resolve_conj().resolve_neg()[tuple(slice(size) for size in once.shape)]
    as_integers(once).copy_(as_integers(values))
    if once.shape != target.shape and not same_bits(target, source):
        raise ValueError("its elements share memory, and are to be given different values")


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a dense tensor as integers, which torch can copy and compare for every dtype; mostly a view."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype == torch.complex128:  # no integer has 16 bytes
        return torch.view_as_real(tensor).view(torch.int64)
    return tensor.view(_INTEGERS[tensor.element_size()])


def from_integers(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_integers`; a view."""
    if dtype == torch.complex128:
        return torch.view_as_complex(integers.view(torch.float64))
    return integers.view(dtype)


def _plain(tensor: Tensor) -> Tensor:
    """Without what a subclass does to operations, and without a graph; the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        detached = tensor.detach()
        return detached if type(detached) is Tensor else detached.as_subclass(Tensor)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether `copy_` can bring all of one into the memory of the other."""
    kinds = [(item.dtype, item.layout, item.is_quantized, item.is_nested, item.device) for item in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    if _is_dense(a):
        return a.shape == b.shape
    return [part.shape for part in _parts(a)] == [part.shape for part in _parts(b)]


@torch.no_grad()
def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Dense tensors that together say all of a tensor: itself, or what a sparse, nested or composed one is made of."""
    if is_lazy(tensor):
        return
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from dense_parts(getattr(tensor, name))
        return
    plain = _plain(tensor)
    yield from [plain] if _is_dense(plain) else _parts(plain)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Dense tensors that say all of one that is not dense."""
    if tensor.is_nested:
        yield tensor._nested_tensor_size()
        yield tensor.values()
    elif tensor.layout == torch.sparse_coo:
        yield torch.tensor([*tensor.shape, tensor.is_coalesced()])
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED:
        yield torch.tensor(tensor.shape)
        by_row = tensor.layout in _BY_ROW
        yield from (
            (tensor.crow_indices(), tensor.col_indices())
            if by_row
            else (
                tensor.ccol_indices(),
                tensor.row_indices(),
            )
        )
        yield tensor.values()
    elif tensor.is_quantized:
        yield tensor.int_repr()
        if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
            yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
            yield torch.tensor(tensor.q_per_channel_axis())
        else:
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
    else:  # memory that is laid out for one library, as mkldnn
        yield tensor.to_dense()


def _written_once(tensor: Tensor) -> Tensor:
    """The part of an expanded tensor that has memory of its own."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout == torch.strided else ()
