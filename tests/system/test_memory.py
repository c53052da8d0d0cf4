"""Evaluation without a second model: what a merge point takes beyond the window, as the operating system counts it."""

import json
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch
from harness.forks import run_forked

from benchmarks import memory
from benchmarks.memory import MIB, RssMeter

PROMISE = 64  # MiB beyond window, scratch slot and block accumulator

linux = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="only Linux tells a process's anonymous memory"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of the 110M model and of all cases of a smaller one, by store, average and dtype of the slots."""
    large, small = (tmp_path_factory.mktemp("memory") / name for name in ("large.json", "small.json"))
    code, printed = run_forked(measure, str(large), str(small))
    assert code == 0, printed
    assert "beyond" in printed
    return [
        {(row["store"], row["average"], row["slot_dtype"]): row for row in json.loads(path.read_text())}
        for path in (large, small)
    ]


def measure(large, small):
    """Both in one process, whose rows are processes of one server: its imports take longer than they do."""
    everywhere = ["--threads", "1", "--device", "cpu"]
    selected = ["--stores", "device", "disk", "--averages", "last", "--slot-dtypes", "same"]
    memory.main([*everywhere, "--json", large, *selected])
    memory.main([*everywhere, "--json", small, "--quick"])


@linux
@pytest.mark.timeout(400)
def test_merging_and_evaluating_a_110m_model_takes_no_second_one(measured):
    rows, _ = measured
    for row in rows.values():
        assert row["elements"] > 109e6
        assert (row["model_mib"], row["scratch_mib"], row["views"]) == (418, 0, 3)
        assert row["beyond_mib"] <= PROMISE
    window = rows["device", "last", "same"]
    assert window["peak_mib"] >= window["window_mib"] > 3 * 417  # the meter saw the slots


@linux
@pytest.mark.timeout(400)
def test_no_store_and_no_kind_of_snapshot_takes_more_than_promised(measured):
    _, rows = measured
    assert len(rows) == 3 * 2 * 2
    for (store, average, slot_dtype), row in rows.items():
        assert row["model_mib"] > 1.5 * PROMISE  # one more copy would show
        # raw comes back from the newest slot where that holds it, else from one scratch slot
        assert (row["scratch_mib"] == 0) == (average == "last" and slot_dtype == "same")
        assert (row["window_mib"] == 0) == (store == "disk")
        assert row["beyond_mib"] <= PROMISE, (store, average, slot_dtype)
        assert row["peak_mib"] > 0.95 * (row["window_mib"] + row["scratch_mib"] + row["accumulator_mib"])


@linux
def test_the_meter_sees_a_copy_that_is_gone_at_the_end():
    weights = torch.full((100 * MIB,), 1, dtype=torch.uint8)
    meter = RssMeter()
    copy = fresh_memory(100 * MIB).copy_(weights)
    time.sleep(0.2)  # the meter is a thread, and on a busy machine it waits for its turn
    del copy
    assert 99 * MIB < meter.stop() < 110 * MIB


@linux
def test_the_meter_sees_what_another_thread_takes():
    meter = RssMeter()
    copies = []
    thread = threading.Thread(target=lambda: copies.append(fresh_memory(100 * MIB).fill_(1)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert 99 * MIB < meter.stop() < 110 * MIB


def fresh_memory(num_bytes):
    """A mapping of its own: what `malloc` returns may lie in memory that earlier tests freed, resident already."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
