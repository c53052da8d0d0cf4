"""What is refused before anything is written, and what the message says."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from pretrain_merge.errors import MergeInputError, MissingDependencyError
from pretrain_merge.kernels.inputs import is_one_block
from pretrain_merge.kernels.weighted_sum import weighted_sum_


def refused(out, snapshots, coefficients, *pieces, **options):
    """The merge raises, says all of these pieces, and leaves every output as it was."""
    before = [tensor.clone() for tensor in out if not tensor.is_meta]
    with pytest.raises(MergeInputError) as caught:
        weighted_sum_(out, snapshots, coefficients, **options)
    for piece in pieces:
        assert piece in str(caught.value)
    assert all(torch.equal(*pair) for pair in zip([t for t in out if not t.is_meta], before, strict=True))
    assert isinstance(caught.value, ValueError)


def ones(*shape, **options):
    return torch.ones(*shape, **options)


def test_no_snapshot_is_refused():
    refused([ones(3)], [], [], "0 snapshots", "take a snapshot first")


@pytest.mark.parametrize("coefficients", [[], [1.0], [0.5, 0.25, 0.25]])
def test_each_snapshot_needs_one_coefficient(coefficients):
    refused([ones(3)], [[ones(3)]] * 2, coefficients, f"{len(coefficients)} coefficients", "2 snapshots", "exactly one")


def test_each_snapshot_needs_every_tensor():
    refused([ones(3), ones(4)], [[ones(3), ones(4)], [ones(3)]], [0.5, 0.5], "snapshots[1] holds 1", "out holds 2")


def test_shapes_must_agree_and_do_not_broadcast():
    snapshots = [[ones(2, 3), ones(4)], [ones(2, 3), ones(1)]]
    refused([ones(2, 3), ones(4)], snapshots, [0.5, 0.5], "snapshots[1][1]", "(1,)", "(4,)", "same shape and device")
    refused([ones(2, 3)], [[ones(3, 2)]], [1.0], "snapshots[0][0]", "(3, 2)", "(2, 3)")


def test_devices_must_agree():
    refused([ones(3)], [[ones(3, device="meta")]], [1.0], "snapshots[0][0]", "meta")
    refused([ones(3, device="meta")], [[ones(3, device="meta")]], [1.0], "out[0]", "materialise")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_only_four_dtypes_can_be_merged(dtype):
    other = torch.zeros(3).to(dtype)
    refused([ones(3)], [[other]], [1.0], "snapshots[0][0]", str(dtype).removeprefix("torch."), "float32, bfloat16")
    with pytest.raises(MergeInputError, match=r"out\[0\]"):
        weighted_sum_([other], [[ones(3)]], [1.0])


def test_sparse_and_negated_memory_are_refused():
    refused([ones(3)], [[ones(3).to_sparse()]], [1.0], "sparse_coo", "plain strided memory")
    negated = torch.ones(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    refused([ones(3)], [[negated]], [1.0], "snapshots[0][0]")


def test_a_dtensor_is_refused_with_the_way_out():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)))
        with pytest.raises(MergeInputError, match=r"out\[0\] is a DTensor.*to_local"):
            weighted_sum_([whole], [[whole]], [1.0])
        shard = whole.to_local()
        weighted_sum_([shard], [[torch.full((4, 2), 3.0)]], [0.5])
        assert torch.equal(whole.to_local(), torch.full((4, 2), 1.5))
    finally:
        dist.destroy_process_group()


def test_outputs_must_not_share_memory_with_each_other():
    tied = ones(4)
    refused([tied, ones(3), tied], [[ones(4), ones(3), ones(4)]], [1.0], "out[0] and out[2]", "list a tied weight once")
    base = ones(10)
    refused([base[:6], base[5:]], [[ones(6), ones(5)]], [1.0], "out[0] and out[1]")


def test_an_output_may_not_be_a_snapshot_of_another_row():
    first, second = ones(4), ones(4)
    refused([first, second], [[second, ones(4)]], [1.0], "snapshots[0][0] and out[1]", "clone")
    refused([first, second], [[ones(4), ones(4)], [ones(4), first]], [0.5, 0.5], "snapshots[1][1] and out[0]")


def test_an_output_may_not_overlap_a_snapshot_in_part():
    base = ones(20)
    refused([base[:10]], [[base[1:11]]], [1.0], "snapshots[0][0] and out[0]")
    refused([base[5:15]], [[base[:10]]], [1.0], "snapshots[0][0] and out[0]")
    square = ones(3, 3)
    refused([square], [[square.t()]], [1.0], "snapshots[0][0] and out[0]")
    refused([square[1]], [[square[:, 0]]], [1.0], "snapshots[0][0] and out[0]")
    refused([ones(4).view(torch.float32)], [[ones(2)]], [1.0], "same shape")
    bits = torch.zeros(8, dtype=torch.float16)
    refused([bits[:4]], [[bits.view(torch.float32).view(torch.bfloat16)[:4]]], [1.0], "snapshots[0][0] and out[0]")


def test_neighbours_in_one_buffer_are_not_an_overlap():
    buffer = torch.arange(40.0)
    weighted_sum_([buffer[10:20], buffer[30:]], [[buffer[:10], buffer[20:30]]], [2.0])
    assert buffer[10:20].tolist() == [2.0 * k for k in range(10)]
    assert buffer[30:].tolist() == [2.0 * k for k in range(20, 30)]
    assert buffer[20:30].tolist() == list(range(20, 30))


def test_snapshots_may_share_memory_among_themselves():
    buffer, out = torch.arange(12.0), torch.zeros(10)
    weighted_sum_([out], [[buffer[:10]], [buffer[2:]]], [0.5, 0.5])
    assert out.tolist() == [k + 1.0 for k in range(10)]


def test_an_output_whose_elements_share_an_address_is_refused():
    refused([ones(1).expand(5)], [[ones(5)]], [1.0], "out[0]", "share one address", "contiguous()")
    refused([ones(6).as_strided((3, 3), (1, 1))], [[ones(3, 3)]], [1.0], "out[0]")


def test_an_inference_tensor_is_refused_as_output_outside_inference_mode():
    with torch.inference_mode():
        out = ones(3)
    refused([out], [[torch.zeros(3)]], [1.0], "out[0]", "inference_mode", "clone")
    weighted_sum_([target := torch.zeros(3)], [[out]], [1.0])  # as a snapshot it is welcome
    assert torch.equal(target, ones(3))


def test_a_backend_must_be_known_and_fit_the_device():
    refused([ones(3)], [[ones(3)]], [1.0], "backend='fast'", "auto, reference, cpu, cuda", backend="fast")


def test_a_backend_that_was_asked_for_by_name_must_be_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pretrain_merge.kernels.cuda", None)
    with pytest.raises(MissingDependencyError, match=r"backend='cuda' cannot be loaded.*triton"):
        weighted_sum_([ones(3)], [[ones(3)]], [1.0], backend="cuda")


def test_coefficients_of_any_kind_and_value_are_taken():
    out = torch.zeros(2)
    weighted_sum_([out], [[ones(2)], [2 * ones(2)]], (torch.tensor(3.0), -1))
    assert out.tolist() == [1.0, 1.0]
    weighted_sum_([out], [[ones(2)]], [math.nan])
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([ones(4, 5), ones(4, 5)], True),
        ([ones(5, 4).t(), ones(5, 4).t()], True),
        ([ones(5, 4).t(), ones(4, 5)], False),
        ([ones(4, 6)[:, :5], ones(4, 6)[:, :5]], False),
        ([ones(1, 5).expand(4, 5), ones(1, 5).expand(4, 5)], False),
        ([ones(2, 3, 4).permute(1, 2, 0), ones(2, 3, 4).permute(1, 2, 0)], True),
        ([ones(1, 5), ones(3, 5)[:1]], True),
    ],
)
def test_one_block_means_the_same_order_without_holes(tensors, expected):
    assert is_one_block(tensors[0], tensors[1:]) is expected
