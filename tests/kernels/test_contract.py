"""What every backend promises: the same tests for the reference, the compiled CPU kernel and the CUDA kernel."""

import math

import numpy as np
import pytest
import torch
from kernels import oracle
from kernels.oracle import random_coefficients

from pretrain_merge.kernels.weighted_sum import Spread

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("inputs", DTYPES, ids=str)
@pytest.mark.parametrize("output", DTYPES, ids=str)
def test_every_dtype_and_size_is_right_to_one_rounding(backend, make, inputs, output):
    # Triton's interpreter has no vectors of 32, and takes 20 ms for each block of each snapshot
    sizes = [0, 33, backend.longest] if backend.longest < 5000 else [0, 1, 31, 32, 33, 1000, backend.longest]
    snapshots = [[make(size, dtype=inputs) for size in sizes] for _ in range(3)]
    out = [make(size, dtype=output) for size in sizes]
    coefficients = random_coefficients(3)
    assert backend.merge(out, snapshots, coefficients) is None
    for i, result in enumerate(out):
        oracle.assert_is_weighted_sum(result, [snapshot[i] for snapshot in snapshots], coefficients)


@pytest.mark.parametrize("num_snapshots", [1, 2, 3, 4, 7, 12, 13, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_snapshots_is_right_to_one_rounding(backend, make, num_snapshots, dtype):
    sizes = [70] if backend.longest < 5000 else [1, 70, 9001]
    if backend.longest < 5000 and num_snapshots > 13:
        num_snapshots -= 48  # five groups of four are as many as sixteen there
    snapshots = [[make(size, dtype=dtype) for size in sizes] for _ in range(num_snapshots)]
    out = [make(size, dtype=dtype) for size in sizes]
    coefficients = random_coefficients(num_snapshots)
    backend.merge(out, snapshots, coefficients)
    for i, result in enumerate(out):
        oracle.assert_is_weighted_sum(result, [snapshot[i] for snapshot in snapshots], coefficients)


@pytest.mark.parametrize("with_double", [False, True])
def test_dtypes_may_differ_between_tensors_and_between_snapshots(backend, make, with_double):
    dtypes = DTYPES if with_double else DTYPES[:3]
    num_snapshots = 5
    shapes = [(7,), (3, 11), (), (129,), (2, 3, 5), (1100,)]
    snapshots = [
        [make(*shape, dtype=dtypes[(i + j) % len(dtypes)]) for i, shape in enumerate(shapes)]
        for j in range(num_snapshots)
    ]
    out = [make(*shape, dtype=dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    coefficients = random_coefficients(num_snapshots)
    backend.merge(out, snapshots, coefficients)
    for i, result in enumerate(out):
        oracle.assert_is_weighted_sum(result, [snapshot[i] for snapshot in snapshots], coefficients)


def test_a_list_of_many_small_tensors_is_right(backend, make):
    sizes = [1 + (37 * i) % 90 for i in range(16 if backend.longest < 5000 else 300)]
    snapshots = [[make(size) for size in sizes] for _ in range(3)]
    out = [torch.empty_like(tensor) for tensor in snapshots[0]]
    backend.merge(out, snapshots, [0.2, 0.3, 0.5])
    for i, result in enumerate(out):
        oracle.assert_is_weighted_sum(result, [snapshot[i] for snapshot in snapshots], [0.2, 0.3, 0.5])


def test_a_list_and_the_same_numbers_as_one_tensor_agree_bit_for_bit(backend, make):
    sizes = [5, 64, 1, 700, 33]
    flat = [make(sum(sizes)) for _ in range(4)]
    split = [list(tensor.split(sizes)) for tensor in flat]
    out_flat, out_split = torch.empty_like(flat[0]), [torch.empty_like(tensor) for tensor in split[0]]
    coefficients = random_coefficients(4)
    backend.merge([out_flat], [[tensor] for tensor in flat], coefficients)
    backend.merge(out_split, split, coefficients)
    assert torch.equal(torch.cat(out_split), out_flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_the_output_may_be_one_of_the_snapshots(backend, make, dtype, position):
    snapshots = [[make(1100, dtype=dtype), make(3, dtype=dtype)] for _ in range(5)]
    originals = [[tensor.clone() for tensor in snapshot] for snapshot in snapshots]
    coefficients = random_coefficients(5)
    backend.merge(snapshots[position], snapshots, coefficients, spread=True)
    for i in range(2):
        oracle.assert_is_weighted_sum(snapshots[position][i], [original[i] for original in originals], coefficients)
    for j in {0, 1, 2, 3, 4} - {position}:
        assert all(torch.equal(*pair) for pair in zip(snapshots[j], originals[j], strict=True))


def test_an_output_that_is_another_view_of_its_snapshot_is_the_same_tensor(backend, make):
    weights = make(50)
    other, before = make(50), weights.clone()
    backend.merge([weights.view(50)], [[other], [weights.detach()]], [0.5, 0.5])
    oracle.assert_is_weighted_sum(weights, [other, before], [0.5, 0.5])


def test_one_snapshot_may_be_given_several_times(backend, make):
    snapshot, out = make(40), make(40)
    backend.merge([out], [[snapshot]] * 3, [0.2, 0.3, 0.5])
    oracle.assert_is_weighted_sum(out, [snapshot] * 3, [0.2, 0.3, 0.5])


def sixteen_bit_values(backend, dtype):
    """All of them; in Triton's interpreter, which takes seconds, the special ones and every 29th, odd and even."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    if backend.longest < 5000:
        infinity = 0x7F80 if dtype is torch.bfloat16 else 0x7C00
        special = [sign | bits for sign in (0, 0x8000) for bits in (0, 1, infinity - 1, infinity, infinity + 1, 0x7FFF)]
        patterns = torch.cat([patterns[::29], torch.tensor(special, dtype=torch.int32)])
    return patterns.to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_every_16_bit_value_is_read_exactly_and_comes_back_bit_for_bit(backend, dtype):
    patterns = sixteen_bit_values(backend, dtype).to(backend.device)
    widened = torch.empty(len(patterns), dtype=torch.float32, device=backend.device)
    same = torch.empty_like(patterns)
    backend.merge([widened], [[patterns]], [1.0])
    backend.merge([same], [[patterns]], [1.0])
    is_nan = patterns.isnan()
    assert torch.equal(widened[~is_nan], patterns[~is_nan].float())
    assert torch.equal(same[~is_nan].view(torch.uint16), patterns[~is_nan].view(torch.uint16))  # -0.0 included
    assert widened[is_nan].isnan().all()
    assert same[is_nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_snapshot_with_coefficient_one_comes_back_bit_for_bit(backend, dtype):
    tiny, big = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    special = torch.tensor([0.0, -0.0, tiny / 8, -tiny / 8, tiny, big, -big, math.inf, -math.inf, 1.0], dtype=dtype)
    snapshot = special.repeat(7).to(backend.device)
    out = torch.empty_like(snapshot)
    backend.merge([out], [[snapshot]], [1.0])
    bits = torch.int32 if dtype is torch.float32 else torch.int64
    assert torch.equal(out.view(bits), snapshot.view(bits))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_halfway_cases_and_their_neighbours_round_to_nearest_even(backend, dtype):
    patterns = sixteen_bit_values(backend, dtype)
    finite = patterns[patterns.isfinite()].float()
    shift = 1 << (
        16 if dtype is torch.bfloat16 else 13
    )  # float32 patterns between two neighbours of the normal numbers
    halfway = finite.view(torch.int32) + shift // 2
    values = torch.cat([(halfway + k).view(torch.float32) for k in (-1, 0, 1)])
    expected = oracle.nearest_even(oracle.as_float64(values), dtype)
    out = torch.empty(len(values), dtype=dtype, device=backend.device)
    backend.merge([out], [[values.to(backend.device)]], [1.0])
    assert np.array_equal(oracle.as_float64(out), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities_propagate_and_stay_where_they_are(backend, make, dtype):
    snapshots = [make(200, dtype=dtype) for _ in range(3)]
    snapshots[0][3] = math.nan
    snapshots[1][40] = math.inf
    snapshots[2][70] = -math.inf
    snapshots[0][199], snapshots[1][199] = math.inf, -math.inf
    out = make(200, dtype=dtype)
    backend.merge([out], [[snapshot] for snapshot in snapshots], [0.5, 0.25, 0.25])
    assert out[3].isnan()
    assert out[40] == math.inf
    assert out[70] == -math.inf
    assert out[199].isnan()
    assert out.isfinite().sum() == 196


def test_a_zero_coefficient_does_not_hide_a_nan(backend, make):
    snapshots = [make(40), make(40)]
    snapshots[0][5] = math.nan
    out = make(40)
    backend.merge([out], [[snapshot] for snapshot in snapshots], [0.0, 1.0])
    assert out.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_nan_of_any_pattern_stays_a_nan_when_it_is_rounded(backend, dtype):
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF, 0x7F80FFFF], dtype=torch.int32)
    snapshot = payloads.view(torch.float32).repeat(9).to(backend.device)
    out = torch.empty(len(snapshot), dtype=dtype, device=backend.device)
    backend.merge([out], [[snapshot]], [1.0])
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_what_is_too_large_becomes_infinite_at_the_right_value(backend, dtype):
    largest = oracle.FORMATS[dtype].maximum
    half_step = oracle.half_ulp(np.array([largest]), dtype)[0]
    below = np.float32(largest + half_step) if dtype is torch.float16 else None
    values = [largest, -largest, largest + half_step, -largest - half_step]
    if below is not None:
        values.append(float(np.nextafter(below, np.float32(0))))
    snapshot = torch.tensor(values, dtype=torch.float32, device=backend.device).repeat(11)
    out = torch.empty(len(snapshot), dtype=dtype, device=backend.device)
    backend.merge([out], [[snapshot]], [1.0])
    assert np.array_equal(oracle.as_float64(out), oracle.nearest_even(oracle.as_float64(snapshot), dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_subnormal_numbers_are_not_flushed(backend, make, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    snapshots = [(make(500) * tiny * 0.2).to(dtype) for _ in range(4)]
    out = torch.zeros(500, dtype=dtype, device=backend.device)
    backend.merge([out], [[snapshot] for snapshot in snapshots], [0.25] * 4)
    assert ((out != 0) & (out.abs() < tiny)).sum() > 300
    oracle.assert_is_weighted_sum(out, snapshots, [0.25] * 4)


def test_nothing_to_merge_is_fine(backend):
    assert backend.merge([], [[], []], [0.5, 0.5]) is None
    assert backend.merge([], [[], []], [0.5, 0.5], spread=True) == Spread(0.0, 0.0)
    empty = [torch.empty(0, 3, device=backend.device)]
    assert backend.merge(empty, [empty, empty], [0.5, 0.5], spread=True) == Spread(0.0, 0.0)


LAYOUTS = {
    "transposed weights": lambda make: [make(9, 40).t() for _ in range(4)],
    "channels-last": lambda make: [make(2, 3, 5, 4).to(memory_format=torch.channels_last) for _ in range(4)],
    "rows of a larger matrix": lambda make: [make(20, 30)[::2] for _ in range(4)],
    "columns of a larger matrix": lambda make: [make(20, 30)[:, 3:17] for _ in range(4)],
    "an output of other strides": lambda make: [make(40, 9), make(40, 9), make(40, 9), make(9, 40).t()],
    "a snapshot of other strides": lambda make: [make(9, 40).t(), make(40, 9), make(40, 9), make(40, 9)],
    "expanded snapshots": lambda make: [make(1, 30).expand(20, 30) for _ in range(3)] + [make(20, 30)],
    "scalars": lambda make: [make() for _ in range(4)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_are_handled_and_nothing_around_a_view_changes(backend, make, layout):
    *snapshots, out = LAYOUTS[layout](make)
    base = out if out._base is None else out._base
    before, inside = base.clone(), torch.zeros_like(base, dtype=torch.bool)
    inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    backend.merge([out], [[snapshot] for snapshot in snapshots], [0.2, 0.3, 0.5])
    oracle.assert_is_weighted_sum(out, snapshots, [0.2, 0.3, 0.5])
    assert torch.equal(base[~inside], before[~inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 3, 17])
def test_addresses_need_no_alignment_and_neighbours_stay_untouched(backend, make, dtype, offset):
    buffers = [make(1300, dtype=dtype) for _ in range(4)]
    views = [buffer[(offset + j) % 19 : (offset + j) % 19 + 1234] for j, buffer in enumerate(buffers)]
    *snapshots, out = views
    start, before = out.storage_offset(), buffers[3].clone()
    backend.merge([out], [[snapshot] for snapshot in snapshots], [0.2, 0.3, 0.5])
    oracle.assert_is_weighted_sum(out, snapshots, [0.2, 0.3, 0.5])
    assert torch.equal(buffers[3][:start], before[:start])
    assert torch.equal(buffers[3][start + 1234 :], before[start + 1234 :])


def test_parameters_that_require_grad_are_written_without_a_graph(backend, make):
    parameter = torch.nn.Parameter(make(64))
    inside_block = torch.nn.Parameter(make(8, 8))
    others = [[make(64), make(8, 8)] for _ in range(2)]
    before = parameter.detach().clone()
    backend.merge([parameter, inside_block], [*others, [parameter, inside_block]], [0.2, 0.3, 0.5])
    oracle.assert_is_weighted_sum(parameter, [others[0][0], others[1][0], before], [0.2, 0.3, 0.5])
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.grad_fn is None
    assert torch.is_grad_enabled()


def test_autograd_sees_the_write(backend, make):
    parameters = [torch.nn.Parameter(make(32)), torch.nn.Parameter(make(4, 6).t())]
    versions = [parameter._version for parameter in parameters]
    loss = sum((parameter**2).sum() for parameter in parameters)
    backend.merge(parameters, [[make(32), make(6, 4)]], [1.0])
    assert all(p._version > version for p, version in zip(parameters, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_data_of_a_parameter_can_be_written_behind_autograds_back(backend, make):
    parameter, snapshot = torch.nn.Parameter(make(32)), make(32)
    version = parameter._version
    backend.merge([parameter.data], [[snapshot]], [1.0])
    assert torch.equal(parameter.detach(), snapshot)
    assert parameter._version == version


def test_outputs_made_in_inference_mode_can_be_written_there(backend, make):
    snapshot = make(32)
    with torch.inference_mode():
        out = torch.zeros(32, device=backend.device)
        backend.merge([out], [[snapshot]], [1.0])
    assert torch.equal(out, snapshot)


class TestTheOracleCatches:
    """Implementations that look right, and that the tolerance above must refuse."""

    @pytest.fixture(autouse=True)
    def ten_snapshots(self):
        generator = torch.Generator().manual_seed(10)
        self.snapshots = [torch.randn(4000, generator=generator).bfloat16() for _ in range(10)]
        self.coefficients = [0.1] * 10

    def refuses(self, result):
        with pytest.raises(AssertionError, match="allowed error"):
            oracle.assert_is_weighted_sum(result, self.snapshots, self.coefficients)

    def test_a_right_one_passes(self):
        exact = oracle.weighted_sum(self.snapshots, self.coefficients)
        for dtype in DTYPES:
            oracle.assert_is_weighted_sum(torch.from_numpy(exact).to(dtype), self.snapshots, self.coefficients)

    def test_a_bfloat16_accumulator(self):
        total = torch.zeros(4000, dtype=torch.bfloat16)
        for snapshot in self.snapshots:
            total += 0.1 * snapshot
        self.refuses(total)

    def test_a_float16_accumulator_behind_a_bfloat16_output(self):
        total = torch.zeros(4000, dtype=torch.float16)
        for snapshot in self.snapshots:
            total += 0.1 * snapshot.half()
        self.refuses(total.bfloat16())

    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
    def test_truncation_instead_of_rounding(self, dtype):
        exact = torch.from_numpy(oracle.weighted_sum(self.snapshots, self.coefficients)).float()
        lost = 16 if dtype is torch.bfloat16 else 13
        self.refuses(((exact.view(torch.int32) >> lost) << lost).view(torch.float32).to(dtype))

    def test_products_rounded_to_the_output_dtype(self):
        products = [(0.1 * snapshot.float()).bfloat16().float() for snapshot in self.snapshots]
        self.refuses(sum(products).bfloat16())

    def test_a_float32_sum_where_float64_was_promised(self):
        total = sum(0.1 * snapshot.float() for snapshot in self.snapshots)
        self.refuses(total.double())

    def test_coefficients_in_the_wrong_order(self):
        coefficients = [0.055 + 0.01 * j for j in range(10)]
        right = torch.from_numpy(oracle.weighted_sum(self.snapshots, coefficients[::-1])).bfloat16()
        with pytest.raises(AssertionError, match="allowed error"):
            oracle.assert_is_weighted_sum(right, self.snapshots, coefficients)

    def test_one_element_that_was_left_out(self):
        result = torch.from_numpy(oracle.weighted_sum(self.snapshots, self.coefficients)).float()
        result[-1] = 0.0
        self.refuses(result)
