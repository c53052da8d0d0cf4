"""Comparing elements by their bits: what is equal as a number may be other bits, and the other way round."""

import pytest
import torch

from pretrain_merge.parameters import all_same_bits, elements

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(dtype, sizes=((3, 5), (7,), (0,), (64, 8))):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return ours, [tensor.clone() for tensor in ours]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("chunk", [8, 24, 1 << 20])
def test_one_bit_is_found_wherever_it_is(monkeypatch, dtype, chunk):
    monkeypatch.setattr(elements, "_CHUNK_BYTES", chunk)
    ours, theirs = both(dtype)
    assert all_same_bits(ours, theirs)
    for tensor in (tensor for tensor in theirs if tensor.numel()):
        raw = tensor.view(-1).view(torch.uint8)
        for index in (0, len(raw) // 2, -1):
            raw[index] ^= 1
            assert not all_same_bits(ours, theirs)
            raw[index] ^= 1
    assert all_same_bits(ours, theirs)


def test_nan_is_itself_by_its_payload_and_zero_has_a_sign():
    nan = torch.tensor([float("nan"), 1.0])
    assert all_same_bits([nan], [nan.clone()])
    other = nan.clone()
    other.view(torch.int32)[0] = 0x7FC00001
    assert not all_same_bits([nan], [other])
    assert not all_same_bits([torch.tensor([0.0])], [torch.tensor([-0.0])])


def test_shape_does_not_matter_and_parts_of_larger_memory_are_compared():
    whole = torch.arange(25.0, dtype=torch.float16)
    assert all_same_bits([whole[1:13]], [whole[1:13].clone().view(3, 4)])
    assert not all_same_bits([whole[1:13]], [whole[2:14].clone()])
