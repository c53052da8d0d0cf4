"""The host store: parts that pinned memory can hold without waste, and captures that the next step waits for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_merge.stores import host
from pretrain_merge.stores.host import HostStore


@given(sizes=st.lists(st.integers(0, 3_000_000), min_size=1, max_size=4))
def test_parts_are_the_tensors_in_order_and_their_sizes_are_powers_of_two_but_for_small_ones(sizes):
    tensors = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
    parts = list(host._parts(tensors))
    position = 0
    for tensor in tensors:
        start = 0
        while start < tensor.numel():
            part = parts[position]
            assert part.data_ptr() == tensor.data_ptr() + 2 * start
            is_power = part.numel() & (part.numel() - 1) == 0
            is_last = start + part.numel() == tensor.numel()
            assert is_power or (is_last and part.numel() < host._SMALLEST_PART)
            assert part.numel() <= host._LARGEST_PART
            start += part.numel()
            position += 1
        assert start == tensor.numel()
    assert position == len(parts)


def test_pinned_memory_wastes_less_than_a_part_in_a_hundred_on_a_model():
    def rounded_up(size):  # what torch allocates
        return 1 << (size - 1).bit_length()

    sizes = [32_000 * 768, 768 * 768, 2048 * 768, 3_000_001, 50_257 * 1600]
    whole = sum(rounded_up(2 * size) for size in sizes) / (2 * sum(sizes))
    tensors = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
    in_parts = sum(rounded_up(2 * part.numel()) for part in host._parts(tensors)) / (2 * sum(sizes))
    assert in_parts < 1.01 < 1.25 < whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_of_many_parts_comes_back_whole(monkeypatch, dtype):
    monkeypatch.setattr(host, "_LARGEST_PART", 64)
    monkeypatch.setattr(host, "_SMALLEST_PART", 8)
    tensors = {"weight": torch.randn(1003), "bias": torch.randn(5), "scale": torch.tensor(2.0), "none": torch.zeros(0)}
    store = HostStore()
    store.write(0, tensors, [dtype] * 4)
    store.write(1, tensors, [dtype] * 4)
    out = [torch.full_like(tensor, float("nan")) for tensor in tensors.values()]
    for use in (lambda: store.read_(out, 0), lambda: store.merge_(out, [0, 1], [0.25, 0.75])):
        use()
        for tensor, expected in zip(out, tensors.values(), strict=True):
            assert torch.equal(tensor, expected.to(dtype).float())


def test_p23_a_slot_keeps_no_memory_of_the_live_tensors():
    live = torch.randn(1000)
    store = HostStore()
    store.write(0, {"weight": live}, [torch.float32])
    held = {part.untyped_storage().data_ptr() for part in store._slots[0]}
    assert live.untyped_storage().data_ptr() not in held  # P23: on a CPU, `.cpu()` would be the live tensor itself


cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: elsewhere a capture is over when it returns"
)


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p27_the_next_optimizer_step_waits_for_a_copy_that_is_still_going_on(dtype):
    weight = torch.nn.Parameter(torch.zeros(2**26, device="cuda"))  # 256 MiB: the copy takes milliseconds,
    optimizer = torch.optim.SGD([weight], lr=1.0)  # the step microseconds
    weight.grad = torch.ones_like(weight)
    store = HostStore()
    for step in range(20):
        store.write(step % 3, {"weight": weight.detach()}, [dtype])
        optimizer.step()
        out = [torch.full((2**26,), float("nan"))]
        store.read_(out, step % 3)
        assert torch.equal(out[0], torch.full((2**26,), -float(step)))
    store.clear()


@cuda
def test_without_the_wait_the_copy_would_be_torn(monkeypatch):
    monkeypatch.setattr(host._AsyncCapture, "delay_next_step", lambda _: None)
    weight = torch.nn.Parameter(torch.zeros(2**26, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    store, torn = HostStore(), False
    for step in range(20):
        store.write(0, {"weight": weight.detach()}, [torch.float32])
        optimizer.step()
        out = [torch.empty(2**26)]
        store.read_(out, 0)
        torn |= not torch.equal(out[0], torch.full((2**26,), -float(step)))
    store.clear()
    assert torn


@cuda
def test_what_changes_without_an_optimizer_waits_once_the_store_is_settled():
    total = torch.zeros(2**26, device="cuda")  # the accumulator of a block, which the next block starts over
    store = HostStore()
    for step in range(20):
        store.write(0, {"weight": total}, [torch.float32])
        store.wait_for_copy()
        total.fill_(float(step + 1))
        out = [torch.full((2**26,), float("nan"))]
        store.read_(out, 0)
        assert torch.equal(out[0], torch.full((2**26,), float(step)))
    store.clear()


@cuda
def test_a_capture_waits_for_the_step_that_made_the_weights():
    weight = torch.zeros(2**22, device="cuda")
    store = HostStore()
    for step in range(20):
        busy = torch.randn(2000, 2000, device="cuda")
        for _ in range(5):
            busy = busy @ busy * 1e-3
        weight.fill_(float(step))
        store.write(0, {"weight": weight}, [torch.float32])
        out = [torch.empty(2**22)]
        store.read_(out, 0)
        assert torch.equal(out[0], torch.full((2**22,), float(step)))
    store.clear()


@cuda
def test_slots_are_pinned_and_a_cleared_store_leaves_no_hook_on_optimizers():
    hooks = torch.optim.optimizer._global_optimizer_pre_hooks
    before = len(hooks)
    store = HostStore()
    store.write(0, {"weight": torch.ones(10, device="cuda"), "offloaded": torch.ones(3)}, [torch.float32] * 2)
    assert [part.is_pinned() for part in store._slots[0]] == [True, False]
    assert len(hooks) == before + 1
    store.clear()
    assert len(hooks) == before


@cuda
def test_a_merge_on_the_device_is_the_merge_on_the_host():
    live = {"weight": torch.randn(2**21 + 7, device="cuda"), "norm": torch.randn(5, device="cuda")}
    store, expected = HostStore(), [torch.zeros(2**21 + 7), torch.zeros(5)]
    snapshots = []
    for slot in range(4):
        for tensor in live.values():
            tensor.mul_(1.01)
        store.write(slot, live, [torch.float32] * 2)
        snapshots.append([tensor.cpu() for tensor in live.values()])
    out = list(live.values())
    store.merge_(out, [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4])
    for total, *row in zip(expected, *snapshots, strict=True):
        total.copy_(sum(c * x.double() for c, x in zip([0.1, 0.2, 0.3, 0.4], row, strict=True)))
    for tensor, reference in zip(out, expected, strict=True):
        torch.testing.assert_close(tensor.cpu(), reference, rtol=3e-7, atol=1e-7)
    store.clear()
