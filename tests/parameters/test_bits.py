import warnings

import pytest
import torch
from torch import Tensor, nn

from pretrain_merge.parameters.bits import as_integers, copy_of, same_bits, write_back


def raw_bytes(dtype: torch.dtype) -> Tensor:
    return torch.arange(8 * dtype.itemsize, dtype=torch.uint8).view(dtype)


X = torch.linspace(-1, 1, 24).view(4, 6)
DTYPES = [
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "uint1", "int4", "uint7", "bits8"),
    *("bits16", "uint64", "complex32", "complex64", "complex128"),
]
with warnings.catch_warnings():  # of torch, on what it calls prototypes or deprecated
    warnings.simplefilter("ignore")
    KINDS = {name: raw_bytes(getattr(torch, name)) for name in DTYPES} | {
        "float32": X.clone(),
        "parameter": nn.Parameter(X.clone()),
        "bool": X > 0,
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "transposed": X.clone().t(),
        "with gaps": X.clone()[:, ::2],
        "expanded": X[0].clone().expand(5, 6),
        "expanded, of 4 bits": raw_bytes(torch.float4_e2m1fn_x2).expand(3, 8),
        "overlapping": torch.arange(6.0).unfold(0, 3, 1),
        "conjugate": raw_bytes(torch.complex64).conj(),
        "negative": raw_bytes(torch.complex64).conj().imag,
        "of a subclass": X.clone().as_subclass(type("Mine", (Tensor,), {})),
        "COO": (X * (X > 0)).to_sparse(),
        "COO, not coalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2)),
        "CSR": (X * (X > 0)).to_sparse_csr(),
        "CSC": X.to_sparse_csc(),
        "BSR": X.to_sparse_bsr((2, 2)),
        "nested": torch.nested.nested_tensor([X[:2], X[2:, :3]]),
        "jagged": torch.nested.nested_tensor([X[:1], X[1:]], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
        "quantised by channel": torch.quantize_per_channel(
            X, X[:, 5] + 2, torch.zeros(4, dtype=torch.int64), 0, torch.qint8
        ),
    }


def written_over(tensor: Tensor) -> None:
    """Other bits in the same memory, as an evaluation may leave them."""
    with torch.no_grad():
        if tensor.is_quantized:
            tensor.copy_(tensor.__class__.clone(tensor).copy_(torch.zeros(tensor.shape)))
        elif tensor.layout == torch.sparse_coo:
            tensor._values().fill_(7)
        elif tensor.layout != torch.strided or tensor.is_nested:
            tensor.values().fill_(7)
        else:
            storage = tensor.detach().untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0 if tensor.dtype == torch.bool else 1)


@pytest.fixture(params=KINDS, name="tensor")
def _tensor(request):
    if request.param in ("conjugate", "negative"):  # a copy is neither
        conjugate = raw_bytes(torch.complex64).conj()
        return conjugate if request.param == "conjugate" else conjugate.imag
    return copy_of(KINDS[request.param]) if request.param not in ("overlapping", "parameter") else KINDS[request.param]


def test_a_copy_has_the_same_bits_and_memory_of_its_own(tensor):
    copy = copy_of(tensor)
    assert same_bits(copy, tensor)
    assert same_bits(tensor, copy)
    if tensor.numel():
        written_over(copy)
        assert not same_bits(copy, tensor)


def test_what_was_written_over_comes_back_bit_for_bit_and_in_place(tensor):
    copy, place = copy_of(tensor), tensor.data_ptr() if tensor.layout == torch.strided and not tensor.is_nested else 0
    if tensor.numel():
        written_over(tensor)
        assert not same_bits(tensor, copy)
    write_back(tensor, copy)
    assert same_bits(tensor, copy)
    assert not place or tensor.data_ptr() == place


@pytest.mark.parametrize(
    "changed",
    [
        lambda: torch.tensor([]).resize_(4),
        lambda: torch.zeros(3, dtype=torch.float64),
        lambda: torch.ones(2, 3),
    ],
)
def test_a_size_or_dtype_that_changed_comes_back_too(changed):
    tensor = torch.tensor([])
    copy = copy_of(tensor)
    tensor.data = changed()
    write_back(tensor, copy)
    assert same_bits(tensor, copy)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_pattern_of_non_zeros_that_changed_comes_back_too(layout):
    tensor = getattr(torch.eye(3), layout)()
    copy = copy_of(tensor)
    other = getattr(torch.ones(3, 3), layout)()
    tensor.resize_as_sparse_(other).copy_(other)
    assert not same_bits(tensor, copy)
    write_back(tensor, copy)
    assert same_bits(tensor, copy)


def test_bits_are_compared_and_not_numbers():
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(3), torch.zeros(3, dtype=torch.int32))
    assert not same_bits(torch.zeros(3), torch.zeros(1, 3))
    assert not same_bits(torch.eye(2).to_sparse(), torch.eye(2))


def test_elements_that_share_memory_take_no_different_values():
    with pytest.raises(ValueError, match="share memory"):
        write_back(torch.zeros(1, 3).expand(5, 3), torch.arange(15.0).view(5, 3))


def test_a_parameter_that_is_not_there_yet_is_left_alone():
    weight = nn.LazyLinear(3).weight
    assert copy_of(weight) is weight
    write_back(weight, copy_of(weight))


def test_the_integers_of_a_dense_tensor_are_its_own_memory():
    assert as_integers(X).data_ptr() == X.data_ptr()
