"""What stands for the objects of `torch.save`: tensors that have a place in place of memory, and what lies beside them.

The list is that of `torch.load(weights_only=True)`, and plain values of libraries that people keep among their
hyperparameters, which nobody needs here. This module knows names and arguments. It reads nothing, and loads no torch.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain_merge.offline.plain_pickle import Name, inert
from pretrain_merge.offline.tensors import DTYPES, Dtype, Kind

_MOST_DIMENSIONS = 64  # torch's own


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes that tensors share.

    Attributes:
        key: Its record in the archive.
        dtype: Of its elements; untyped ones are bytes.
        num_bytes: As the pickle says.
    """

    key: str
    dtype: Dtype
    num_bytes: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A dense tensor in an archive.

    Attributes:
        kind: Shape and dtype.
        storage: Holds it.
        first: The byte of the storage at which it begins.
        strides: In elements, where it does not lie in row-major order; None: it does.
    """

    kind: Kind
    storage: Storage
    first: int
    strides: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class OtherTensor:
    """One that is not bytes of its elements.

    Attributes:
        what: In words.
    """

    what: str


def storage_of(saved: Any) -> Storage:
    """What a pickle of torch refers to, by the tuple that it is referred to by.

    Raises:
        ValueError: It is another object.
    """
    kind, storage_type, key, _, num_elements = saved
    if kind != "storage" or not isinstance(storage_type, Dtype) or not isinstance(key, str):
        raise ValueError(f"it refers to something other than a storage ({str(kind)[:50]!r})")
    (num_elements,) = _numbers([num_elements])
    return Storage(key, storage_type, num_elements * storage_type.itemsize)


def _dense(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Dtype | None = None) -> Any:
    """`_rebuild_tensor_v2` of torch; of `rest` the third, where there is one, says what its bits do not."""
    if not isinstance(storage, Storage):
        raise ValueError("it has a tensor without a storage")
    shape, strides, (offset,) = _numbers(size), _numbers(stride), _numbers([offset])
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"it has a tensor with {len(shape)} sizes and {len(strides)} strides")
    # torch keeps a conjugate, and a negative imaginary part, as the bits of the other and a mark
    if len(rest) > 2 and isinstance(rest[2], dict) and any(value is not False for value in rest[2].values()):
        return OtherTensor("a tensor whose bits are not its elements (conjugated)")
    kind = Kind(shape, dtype or storage.dtype)
    first, reach = offset * kind.dtype.itemsize, sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if kind.num_elements and first + (reach + 1) * kind.dtype.itemsize > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    return StoredTensor(kind, storage, first, None if 0 in shape or _are_row_major(shape, strides) else strides)


def _dense_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *metadata: Any
) -> Any:
    """`_rebuild_tensor_v3`: dtypes that have no storage of their own."""
    if not isinstance(dtype, Dtype):
        raise ValueError("it has a tensor without a dtype")
    return _dense(storage, offset, size, stride, requires_grad, hooks, *metadata, dtype=dtype)


def _first(tensor: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return tensor


def _from_cpu(tensor: Any, dtype: Any, *_: Any) -> Any:
    is_same = isinstance(tensor, StoredTensor) and tensor.kind.dtype == dtype
    return tensor if is_same else OtherTensor("a tensor that was converted for its device")


def _of_type(function: Any, kind: Any, arguments: Any, _: Any = None) -> Any:
    """`_rebuild_from_type_v2`: a tensor with attributes, or of a class of its own."""
    if not isinstance(function, Name) or not isinstance(kind, Name) or not isinstance(arguments, tuple):
        raise ValueError("it has a tensor that is not made of one")
    return function.make(*arguments)


def _wrapper(kind: Any, *_: Any) -> OtherTensor:
    return OtherTensor(f"a {kind.path if isinstance(kind, Name) else 'tensor of another class'}")


def _ordered(*items: Any) -> OrderedDict[Any, Any]:
    if items:  # Python 3 sets items one by one
        raise ValueError("it has an OrderedDict of Python 2")
    return OrderedDict()


def _are_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        # along a single element torch keeps whatever stride there was
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("it has a size that is not one")
    return numbers


_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip
_MAKERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_tensor": _dense,
    "torch._utils._rebuild_tensor_v2": _dense,
    "torch._utils._rebuild_tensor_v3": _dense_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda *_: OtherTensor("a tensor of an array"),
    "torch._utils._rebuild_sparse_tensor": lambda *_: OtherTensor("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": lambda *_: OtherTensor("a nested tensor"),
    "torch._utils._rebuild_qtensor": lambda *_: OtherTensor("a quantised tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: OtherTensor("a tensor on the meta device"),
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch.Size": lambda values=(): tuple(values),
}
PATHS = ("pathlib", "pathlib._local")  # the second since Python 3.13
_OF_TORCH = (
    "Tensor", "device", "nn.parameter.Parameter", "nn.parameter.Buffer", "serialization._get_layout",
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)  # fmt: skip
# values that cannot run anything even where they are loaded; among the hyperparameters of real checkpoints
_OF_LIBRARIES = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list range set slice str tuple long unicode "
    "xrange",
    "_codecs": "encode",
    "collections": "Counter defaultdict deque",
    "typing": "Any",
    "types": "SimpleNamespace",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "argparse": "Namespace",
    "jsonargparse._namespace": "Namespace",
    "jsonargparse.namespace": "Namespace",
    **dict.fromkeys(PATHS, "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    "numpy": "dtype ndarray",
    **{f"numpy.{module}.multiarray": "scalar _reconstruct" for module in ("core", "_core")},
    "numpy.dtypes": " ".join(
        f"{name}DType"
        for name in (
            "Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float16", "Float32",
            "Float64", "Complex64", "Complex128", "Str",
        )
    ),
    "omegaconf.base": "Metadata ContainerMetadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": " ".join(
        f"{name}Node" for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String", "Union")
    ),
    "lightning.fabric.utilities.data": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
}  # fmt: skip

NAMES: Mapping[str, Name | Dtype] = {
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch.{device}{name}": DTYPES[dtype] for name, dtype in _STORAGES.items() for device in ("", "cuda.")},
    "torch.storage.UntypedStorage": DTYPES["uint8"],
    **{
        path: inert(path)
        for name in _STORAGES
        for path in (
            f"torch.{of}{name.replace('Storage', 'Tensor')}" for of in ("", "cuda.", "sparse.", "cuda.sparse.")
        )
    },
    **{path: Name(path, make) for path, make in _MAKERS.items()},
    **{path: inert(path) for path in (f"torch.{name}" for name in _OF_TORCH)},
    **{
        path: inert(path)
        for module, names in _OF_LIBRARIES.items()
        for path in (f"{module}.{name}" for name in names.split())
    },
}
