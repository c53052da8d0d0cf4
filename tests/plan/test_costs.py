"""Predicted bytes are those that stores, blocks and files really take; predicted times are bytes over rates."""

import os
import struct

import pytest
import torch
from harness.ranks import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard

from pretrain_merge import RollingMerger, parameters
from pretrain_merge.cadence import Quantity
from pretrain_merge.errors import ConfigError
from pretrain_merge.merged_models.merged import save_merged
from pretrain_merge.plan import HARDWARE, Hardware, Layout, Measured, Merging, Model, Question, Training, make_plan
from pretrain_merge.stores import choose

WINDOW = 3
STEP = 2.0
RUN = Training(tokens_per_step=1000, tokens_per_evaluation=300, step_seconds=STEP)
GPU = Hardware(1e12, 10**9, 1e9, 1e8, 2e7, 8 * 10**9, 10**10, 4e7, 4)
CPU = Hardware(1e12, None, 1e9, None, 2e7, 8 * 10**9, 10**10, 4e7, 4)


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1))


def model_of(module):
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    return Model("a test", shapes, sum(parameter.numel() for parameter in module.parameters()))


def asked(model, layout=None, *, hardware=CPU, training=RUN, **merging):
    options = {"every": Quantity(1), "window": WINDOW, "views": (WINDOW,), "store": "device"} | merging
    return make_plan(Question(model, layout or Layout(), hardware, Merging(**options), training))


def full_window(module, *, every=1, **options):
    merger = RollingMerger(window=WINDOW, every=every, **options)
    for step in range(1, WINDOW * every + 1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(step)  # no snapshot is like another
        merger.observe(module, step)
    return merger


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def slots_of(merger):
    return merger._stored._store._slots


def allocated(merger):
    """Bytes of every slot in the store."""
    return [num_bytes(slot) for slot in slots_of(merger).values()]


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize(
    ("dtype", "slots"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16"), ("float64", "float32")]
)
def test_slots_in_memory_take_what_was_predicted(dtype, slots, store):
    module = network().to(getattr(torch, dtype))
    plan = asked(
        model_of(module),
        itemsize=getattr(torch, dtype).itemsize,
        slot_itemsize=getattr(torch, slots or dtype).itemsize,
    )
    taken = allocated(full_window(module, store=store, slot_dtype=slots))
    assert taken == [plan.slot_bytes] * WINDOW
    assert sum(taken) == plan.window_bytes


def tensor_bytes(path):
    """Of a safetensors file, less the header that says how long it is."""
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return path.stat().st_size - 8 - header


def test_slot_files_take_what_was_predicted(tmp_path):
    module = network()
    merger = full_window(module, store="disk", store_folder=str(tmp_path))
    merger._stored._store._finish()
    plan = asked(model_of(module), store="disk")
    taken = [tensor_bytes(path) for path in (tmp_path / "rank-0000").glob("slot-*.safetensors")]
    assert taken == [plan.slot_bytes] * WINDOW
    assert plan.slot_file_bytes_per_host == sum(taken) + plan.slot_bytes
    merger.close()


def test_a_slots_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    module, seen = network(), []
    merger = full_window(module, store="disk", store_folder=str(tmp_path))
    merger._stored._store._finish()
    fsync = os.fsync

    def counted(file):
        files = [path for path in (tmp_path / "rank-0000").iterdir() if path.name != "lock"]
        seen.append(sum(path.stat().st_size for path in files))
        fsync(file)

    monkeypatch.setattr(os, "fsync", counted)
    merger.observe(module, WINDOW + 1)
    merger._stored._store._finish()
    one_file = (tmp_path / "rank-0000" / "slot-000.safetensors").stat().st_size
    assert seen == [(WINDOW + 1) * one_file]
    merger.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_open_block_takes_what_was_predicted(dtype):
    module = network().to(dtype)
    merger = full_window(module, average="block", store="device")
    plan = asked(model_of(module), average="block", itemsize=dtype.itemsize, slot_itemsize=dtype.itemsize)
    assert num_bytes(merger._block.sums) == plan.accumulator_bytes > 0
    assert asked(model_of(module)).accumulator_bytes == 0


@pytest.mark.parametrize(
    ("options", "merging"),
    [
        ({}, {}),
        ({"slot_dtype": "bfloat16"}, {"slot_itemsize": 2}),
        ({"average": "block"}, {"average": "block"}),
    ],
)
def test_raw_is_copied_aside_exactly_where_that_was_predicted(monkeypatch, options, merging):
    module = network()
    merger, copies = full_window(module, store="device", every=2, **options), {}  # the mean of one step would be raw
    clone = torch.Tensor.clone

    def counted(tensor, *args, **kwargs):
        # by what is copied: under a default device (a mode of torch's) one call comes here twice
        copies[tensor.data_ptr()] = copied = clone(tensor, *args, **kwargs)
        return copied

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    with merger.merged(module, "sma"):
        pass
    assert num_bytes(copies.values()) == asked(model_of(module), **merging).scratch_bytes


def test_a_merged_model_takes_what_was_predicted(tmp_path):
    module = network()
    save_merged(module, tmp_path / "merged", {})
    plan = asked(model_of(module), slot_itemsize=2)
    assert tensor_bytes(tmp_path / "merged" / "model.safetensors") == plan.merged_model_bytes


def sharded_window():
    module = network()
    fully_shard(module)
    merger = full_window(module, store="device", slot_dtype="bfloat16")
    return {
        "window": sum(allocated(merger)),
        "live": num_bytes(parameters.mergeable_tensors(module).values()),
    }


def test_windows_of_uneven_shards_take_what_was_predicted():
    plan = asked(model_of(network()), Layout(shard=2), slot_itemsize=2)
    measured = on_ranks(sharded_window)
    assert max(rank["window"] for rank in measured) == plan.window_bytes > min(rank["window"] for rank in measured)
    assert sum(rank["window"] for rank in measured) == plan.all_window_bytes == plan.saved_window_bytes
    assert max(rank["live"] for rank in measured) == plan.scratch_bytes


def test_adamw_holds_what_is_taken_off_the_device():
    for dtype in (torch.float32, torch.bfloat16):
        module = network().to(dtype)
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(1, 5, dtype=dtype)).sum().backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in module.parameters()]
        moments = [v for state in optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
        held = num_bytes([*module.parameters(), *gradients, *moments])
        plan = asked(model_of(module), hardware=GPU, itemsize=dtype.itemsize, slot_itemsize=dtype.itemsize)
        assert GPU.device_bytes - plan.places["device"].free == held


def test_replicas_each_have_a_window_and_are_saved_once():
    plan = asked(Model("a test", ((100, 1),), 100), Layout(shard=2, replicate=4))
    assert plan.all_window_bytes == 4 * WINDOW * 4 * 100
    assert plan.saved_window_bytes == WINDOW * 4 * 100


@given(st.integers(10**4, 10**9), st.integers(10**4, 10**10), st.integers(10**6, 10**11))
def test_auto_is_what_the_stores_would_choose(elements, device, host):
    hardware = Measured(device_bytes=device, host_bytes=host).over(GPU)
    plan = asked(Model("a test", ((elements, 1),), elements), hardware=hardware, store="auto")
    free = {name: place.free for name, place in plan.places.items()}
    chosen, _ = choose._chosen(plan.window_bytes, free["device"], free["host"], has_disk=True)
    assert plan.store == chosen


def test_each_store_says_what_it_needs_and_whether_that_is_there():
    model = Model("a test", ((10**7, 1),), 10**7)
    places = asked(model, Layout(shard=2), hardware=GPU, average="block").places
    slot = 4 * 5 * 10**6
    assert places["device"].needed == WINDOW * slot + 2 * slot  # the scratch copy and the sum
    assert places["device"].free == GPU.device_bytes - 4 * slot
    assert (places["host"].needed, places["host"].free) == (WINDOW * slot, GPU.host_bytes // 2)
    assert (places["disk"].needed, places["disk"].free) == ((WINDOW + 1) * slot, GPU.disk_bytes // 2)
    assert all(place.fits for place in places.values())
    tight = asked(model, hardware=Measured(device_bytes=10**8).over(GPU)).places["device"]
    assert (tight.free, tight.fits) == (0, False)


N = 10**6
MODEL = Model("a test", ((N, 1),), N // 2)


def moved(cost):
    return [(move.amount, move.through) for move in cost.moves]


@pytest.mark.parametrize(
    ("merging", "capture", "merge"),
    [
        ({}, 3 * 4, (3 + 1 + 2) * 4),  # read to check, read, written; slots, out; raw back
        ({"itemsize": 2, "slot_itemsize": 2}, 3 * 2, (3 + 1 + 2) * 2),
        ({"slot_itemsize": 2}, 4 + 4 + 2, 3 * 2 + 4 + 4 * 4),  # raw aside and back
        ({"views": (3, 2)}, 3 * 4, (4 + 3 + 2) * 4),
        ({"views": (2,)}, 3 * 4, (4 + 3 + 2) * 4),  # the spread is that of the whole window
        ({"average": "block"}, 4 + 8 + 8, (3 + 1) * 4 + 4 * 4),
        ({"average": "block", "itemsize": 2, "slot_itemsize": 2}, 4 + 8 + 4 + 2, (3 + 1) * 2 + 4 * 2),
    ],
)
def test_what_moves_on_the_device(merging, capture, merge):
    costs = asked(MODEL, hardware=GPU, **merging).costs
    assert moved(costs["capture"]) == [(N * capture, "memory")]
    assert moved(costs["merge"]) == [(N * merge, "memory")]
    assert costs["capture"].seconds == N * capture / 1e9
    assert costs["capture"].share == pytest.approx(N * capture / 1e9 / STEP)


def test_a_sample_reads_the_model_and_reads_and_writes_the_sum():
    sample = asked(MODEL, average="block", sample_every=5, itemsize=2, slot_itemsize=2).costs["sample"]
    assert moved(sample) == [(N * (2 + 4 + 4 // 2), "memory")]  # on a CPU a sum's stores fetch nothing
    on_gpu = asked(MODEL, hardware=GPU, average="block", itemsize=2, slot_itemsize=2).costs["sample"]
    assert moved(on_gpu) == [(N * (2 + 4 + 4), "memory")]
    assert sample.period == 5 * STEP
    assert "sample" not in asked(MODEL).costs


def test_the_host_takes_a_snapshot_beside_the_next_step_as_far_as_that_lasts():
    long, short = (
        asked(MODEL, hardware=GPU, store="host", training=Training(1000, 300, step_seconds=seconds)).costs
        for seconds in (1.0, 0.01)
    )
    check = N * 4 / 1e9
    assert long["capture"].seconds == check
    assert short["capture"].seconds == pytest.approx(check + N * 4 / 1e8 - 0.01)
    assert moved(long["merge"]) == [(N * (3 + 1) * 4, "link")]


def test_without_a_device_host_memory_is_as_good():
    here, there = (asked(MODEL, hardware=CPU, store=store).costs for store in ("device", "host"))
    assert {name: cost.seconds for name, cost in here.items()} == {name: cost.seconds for name, cost in there.items()}


def test_the_disk_takes_a_snapshot_from_the_page_cache():
    on_cpu, on_gpu = (asked(MODEL, Layout(shard=2), hardware=item, store="disk").costs for item in (CPU, GPU))
    share = N // 2 * 4
    for costs in (on_cpu, on_gpu):
        assert moved(costs["capture"]) == [(share, "memory"), (share, "page cache")]
        assert [move.rate for move in costs["capture"].beside] == [GPU.disk_rate / 2]  # two ranks on the host
    assert moved(on_gpu["merge"]) == [((3 + 1) * share, "disk")]
    assert moved(on_cpu["merge"]) == [((3 + 2) * share + share // 2, "memory")]
    small = asked(MODEL, hardware=Measured(host_bytes=10**7).over(CPU), store="disk").costs
    assert moved(small["merge"]) == [((3 + 1) * N * 4, "disk")]


def test_a_copy_aside_on_a_cpu_is_made_in_pages_that_are_zeroed_first():
    on_cpu, on_gpu = (asked(MODEL, hardware=item, slot_itemsize=2).costs["merge"] for item in (CPU, GPU))
    assert moved(on_cpu) == [(N * (3 * 2 + 4 // 2 + 5 * 4), "memory")]
    assert moved(on_gpu) == [(N * (3 * 2 + 4 + 4 * 4), "memory")]


@pytest.mark.parametrize(
    ("merging", "capture"),
    [
        ({}, [(3 * N * 4, "memory"), (N, "checks")]),
        ({"slot_itemsize": 2}, [(N * (4 + 4 + 2), "memory"), (N, "checks"), (N, "rounding")]),
        # a mean in float32, whatever the model's dtype
        (
            {"average": "block", "itemsize": 2, "slot_itemsize": 2},
            [(N * (4 + 6 + 4 + 2), "memory"), (N, "checks"), (N, "rounding")],
        ),
    ],
)
def test_a_measured_rate_of_arithmetic_comes_on_top_of_moving(merging, capture):
    hardware = Measured(check_rate=3e9, rounding_rate=5e9).over(CPU)
    cost = asked(MODEL, hardware=hardware, **merging).costs["capture"]
    assert moved(cost) == capture
    of_memory, *others = asked(MODEL, **merging).costs["capture"].moves
    assert not others
    assert cost.seconds == pytest.approx(of_memory.seconds + N / 3e9 + (N / 5e9 if len(capture) == 3 else 0))


def test_an_evaluation_costs_a_third_of_a_step_per_token_and_pass():
    evaluation = asked(MODEL, views=(3, 2)).costs["evaluation"]
    assert evaluation.seconds == pytest.approx(3 * 300 / 1000 * STEP / 3)


def test_a_step_is_estimated_from_activated_parameters_and_tokens():
    training = Training(10**6, 1, utilisation=0.5)
    plan = asked(MODEL, Layout(2), training=training)
    assert plan.step_seconds == 6 * (N // 2) * 10**6 / (2 * 1e12 * 0.5)


@pytest.mark.parametrize(
    ("every", "merge_every", "snapshots", "merges"),
    [
        (Quantity(10), None, 10, 10),
        (Quantity(10), Quantity(25), 10, 25),
        (Quantity(10), Quantity(5), 10, 10),
        (Quantity(2500, "tokens"), None, 2.5, 2.5),
        (Quantity(10, "tokens"), Quantity(4000, "tokens"), 1, 4),
    ],
)
def test_snapshots_and_merges_come_as_often_as_configured(every, merge_every, snapshots, merges):
    plan = asked(MODEL, every=every, merge_every=merge_every)
    assert (plan.steps_between_snapshots, plan.steps_between_merges) == (snapshots, merges)
    assert plan.costs["capture"].period == snapshots * STEP
    assert plan.costs["merge"].period == plan.costs["evaluation"].period == merges * STEP
    assert plan.share == pytest.approx(sum(cost.seconds / cost.period for cost in plan.costs.values()))


@pytest.mark.parametrize(
    ("make", "piece"),
    [
        (lambda: Merging(Quantity(1, "samples")), "every: 1 samples"),
        (lambda: Merging(Quantity(1), store="tape"), "store: 'tape'"),
        (lambda: Merging(Quantity(1), itemsize=2, slot_itemsize=4), "slot_itemsize: 4"),
        (lambda: Merging(Quantity(1), views=()), "views: "),
        (lambda: Training(0, 1), "tokens_per_step: 0"),
        (lambda: Training(1, -1), "tokens_per_evaluation: -1"),
        (lambda: Training(1, 1, step_seconds=0.0), "step_seconds: 0.0"),
        (lambda: Training(1, 1, utilisation=float("nan")), "utilisation: nan"),
        (lambda: Measured(memory_rate=0.0).over(GPU), "measured.memory_rate: 0.0"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(make, piece):
    with pytest.raises(ConfigError, match=r"Allowed|steps or tokens") as caught:
        make()
    assert str(caught.value).startswith(piece)


def test_measured_figures_replace_those_of_the_hardware():
    ours = Measured(memory_rate=5.0, host_bytes=2e9).over(HARDWARE["h100"])
    assert (ours.memory_rate, ours.host_bytes) == (5.0, 2 * 10**9)
    assert ours.flops == HARDWARE["h100"].flops
