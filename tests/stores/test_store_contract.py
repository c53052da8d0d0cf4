"""Any history of captures, merges and reads gives the same bits whatever store keeps the window, and the right ones."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain_merge.stores.device import DeviceStore
from pretrain_merge.stores.disk import DiskStore
from pretrain_merge.stores.host import HostStore
from pretrain_merge.stores.store import slot_dtype

WINDOW = 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 70,000 elements are several parts of a host slot and several staging buffers of a disk slot
SHAPES = [(70_000,), (0, 3), (), (129, 65), (1,), (7, 3, 3)]


def stores_in(folder):
    return {
        "device": DeviceStore(),
        "host": HostStore(),
        "disk": DiskStore(folder / "a"),
        "disk that waits for its writer": DiskStore(folder / "b", staging_bytes=20_000),
    }


def model(seed, dtypes):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer.{index}": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for index, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True))
    }


def bits(tensors):
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def oracle(snapshots, coefficients, dtypes):
    """The sum in float64, rounded once, and how much an accumulator of its own precision may differ before that."""
    for row, dtype in zip(zip(*snapshots, strict=True), dtypes, strict=True):
        wide = [tensor.double().numpy() for tensor in row]
        total = sum((c * x for c, x in zip(coefficients, wide, strict=True)), np.zeros(row[0].shape))
        size = sum((np.abs(c * x) for c, x in zip(coefficients, wide, strict=True)), np.zeros(row[0].shape))
        accumulator = torch.float64 if torch.float64 in (dtype, *(tensor.dtype for tensor in row)) else torch.float32
        slack = len(row) * torch.finfo(accumulator).eps * size + torch.finfo(dtype).eps * np.abs(total)
        yield total, slack + torch.finfo(dtype).smallest_normal


steps = st.one_of(
    st.tuples(st.just("write"), st.integers(0, WINDOW - 1), st.integers(0, 2**31)),
    st.tuples(st.just("merge"), st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=WINDOW), st.booleans()),
    st.tuples(st.just("read"), st.integers(0, WINDOW - 1), st.none()),
    st.tuples(st.just("clear"), st.none(), st.none()),
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=len(SHAPES), max_size=len(SHAPES)),
    chosen=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    history=st.lists(steps, min_size=4, max_size=14),
)
def test_one_history_gives_the_same_bits_in_every_store(tmp_path_factory, dtypes, chosen, history):
    stores = stores_in(tmp_path_factory.mktemp("window"))
    slot_dtypes = [slot_dtype(dtype, chosen) for dtype in dtypes]
    held: dict[int, list[torch.Tensor]] = {}
    try:
        for action, first, second in history:
            if action == "write":
                live = model(second, dtypes)
                held[first] = [tensor.to(dtype) for tensor, dtype in zip(live.values(), slot_dtypes, strict=True)]
                for store in stores.values():
                    mine = {name: tensor.clone() for name, tensor in live.items()}
                    store.write(first, mine, slot_dtypes)
                    store.wait_for_copy()
                    for tensor in mine.values():  # whatever comes next
                        tensor.fill_(float("nan"))
            elif action == "clear":
                held.clear()
                for store in stores.values():
                    store.clear()
            elif action == "read" and first in held:
                expected = [tensor.to(dtype) for tensor, dtype in zip(held[first], dtypes, strict=True)]
                for name, store in stores.items():
                    out = [torch.empty_like(tensor) for tensor in expected]
                    store.read_(out, first)
                    assert bits(out) == bits(expected), name
            elif action == "merge" and held:
                slots = list(held)[: len(first)]
                check_merge(stores, slots, first[: len(slots)], held, dtypes, spread=second)
    finally:
        for store in stores.values():
            store.clear()


def check_merge(stores, slots, coefficients, held, dtypes, *, spread):
    snapshots = [held[slot] for slot in slots]
    results = {}
    for name, store in stores.items():
        out = [torch.full(shape, 7.0, dtype=dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
        results[name] = (out, store.merge_(out, slots, coefficients, spread=spread))
    out, measured = results["device"]
    for tensor, (expected, slack) in zip(out, oracle(snapshots, coefficients, dtypes), strict=True):
        assert (np.abs(tensor.double().numpy() - expected) <= slack).all()
    for name, (other, other_measured) in results.items():
        assert bits(other) == bits(out), name
        assert (other_measured is None) == (measured is None) == (not spread)
        if spread:  # float64 sums of the same numbers in another order
            assert other_measured == pytest.approx(measured, rel=1e-12)


@pytest.fixture(params=["device", "host", "disk", "disk that waits for its writer"])
def store(request, tmp_path):
    stores = stores_in(tmp_path)
    yield stores[request.param]
    for made in stores.values():
        made.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_arithmetic_would_change_come_back_bit_for_bit(store, dtype):
    least = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), least, least / 2, -torch.finfo(dtype).max]
    tensors = {"weight": torch.tensor(special, dtype=dtype)}
    store.write(0, tensors, [dtype])
    out = [torch.ones(len(special), dtype=dtype)]
    store.read_(out, 0)
    assert bits(out) == bits(tensors.values())


def test_a_store_keeps_no_live_tensor_alive(store):
    tensors = {"weight": torch.ones(1000)}
    store.write(0, tensors, [torch.float32])
    store.read_(list(tensors.values()), 0)
    gone = weakref.ref(tensors["weight"])
    del tensors
    gc.collect()
    assert gone() is None


def test_clearing_twice_is_harmless_and_the_store_can_be_used_again(store):
    for value in (1.0, 2.0):
        store.write(0, {"weight": torch.full((10,), value)}, [torch.float32])
        out = [torch.zeros(10)]
        store.read_(out, 0)
        assert out[0].tolist() == [value] * 10
        store.clear()
        store.clear()


@pytest.mark.parametrize(
    ("parameter", "chosen", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
)
def test_a_slot_is_never_wider_than_its_parameter(parameter, chosen, expected):
    assert slot_dtype(parameter, chosen) == expected


def test_the_oracle_refuses_a_sum_in_bfloat16():
    snapshots = [[torch.full((4,), 1.0 + 2.0**-8 * k).to(torch.float32)] for k in range(3)]
    wrong = sum(0.3 * snapshot[0].bfloat16() for snapshot in snapshots).double().numpy()
    ((expected, slack),) = oracle(snapshots, [0.3] * 3, [torch.float32])
    assert (np.abs(wrong - expected) > slack).all()


def test_stores_of_one_process_may_share_a_folder(tmp_path: Path):
    first, second = DiskStore(tmp_path, staging_bytes=64), DiskStore(tmp_path, staging_bytes=64)
    for seed in range(6):
        for store, shift in ((first, 0.0), (second, 100.0)):
            store.write(seed % 2, {"weight": torch.full((5000,), seed + shift)}, [torch.float32])
    for store, shift in ((first, 0.0), (second, 100.0)):
        out = [torch.empty(5000)]
        store.merge_(out, [0, 1], [0.5, 0.5])
        assert out[0].tolist() == [4.5 + shift] * 5000
        store.clear()
