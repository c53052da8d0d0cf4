"""Evaluation without a second model: what a merge point takes beyond the window, as the operating system counts it."""

import ctypes
import json
import mmap
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from harness.forks import run_forked

from benchmarks import memory
from benchmarks.memory import MIB, RssMeter

PROMISE = 64  # MiB beyond window, scratch slot and block accumulator
M_MMAP_THRESHOLD = -3  # of malloc.h

linux = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="only Linux tells a process's anonymous memory"
)


# each two of store, average and dtype of the slots meet; all three together are long
PAIRS = [
    ("device", "last", "same"),
    ("device", "block", "bfloat16"),
    ("host", "last", "bfloat16"),
    ("host", "block", "same"),
    ("disk", "last", "same"),
    ("disk", "block", "bfloat16"),
]
EVERYWHERE = ["--threads", "1", "--device", "cpu"]


def options(store, average, slot_dtype):
    return ["--stores", store, "--averages", average, "--slot-dtypes", slot_dtype]


@pytest.fixture
def forks(tmp_path, monkeypatch):
    """Makes each row of the benchmark a fork of the tests' server: it has the imports behind it that take longest."""

    def in_a_fork(case):
        (tmp_path / "case").write_bytes(pickle.dumps(case))
        code, printed = run_forked(measure_row, str(tmp_path / "case"), str(tmp_path / "row"))
        assert code == 0, printed
        return json.loads((tmp_path / "row").read_text())

    monkeypatch.setattr(memory, "_in_a_process", in_a_fork)


def measure_row(case, row):
    libc = ctypes.CDLL(None)
    # as the benchmark has by the environment of a new process: what is large is a mapping, and not memory freed before
    assert libc.mallopt(M_MMAP_THRESHOLD, 2**16) == 1
    libc.malloc_trim(0)
    Path(row).write_text(json.dumps(memory._measure(pickle.loads(Path(case).read_bytes()))))


def by_case(rows):
    return {(row["store"], row["average"], row["slot_dtype"]): row for row in rows}


@linux
def test_merging_and_evaluating_a_110m_model_takes_no_second_one(forks, capsys):
    check_large(by_case(memory.main([*EVERYWHERE, *options("device", "last", "same")])))
    assert "beyond" in capsys.readouterr().out


@linux
def test_no_store_and_no_kind_of_snapshot_takes_more_than_promised(forks):
    rows = by_case(row for case in PAIRS for row in memory.main([*EVERYWHERE, "--quick", *options(*case)]))
    assert list(rows) == PAIRS
    check_small(rows)


def check_large(rows):
    for row in rows.values():
        assert row["elements"] > 109e6
        assert (row["model_mib"], row["scratch_mib"], row["views"]) == (418, 0, 3)
        assert row["beyond_mib"] <= PROMISE
    window = rows["device", "last", "same"]
    assert window["peak_mib"] >= window["window_mib"] > 3 * 417  # the meter saw the slots


def check_small(rows):
    for (store, average, slot_dtype), row in rows.items():
        assert row["model_mib"] > 1.5 * PROMISE  # one more copy would show
        # raw comes back from the newest slot where that holds it, else from one scratch slot
        assert (row["scratch_mib"] == 0) == (average == "last" and slot_dtype == "same")
        assert (row["window_mib"] == 0) == (store == "disk")
        assert row["beyond_mib"] <= PROMISE, (store, average, slot_dtype)
        assert row["peak_mib"] > 0.95 * (row["window_mib"] + row["scratch_mib"] + row["accumulator_mib"])


@linux
@pytest.mark.long
@pytest.mark.timeout(400)
def test_all_rows_of_the_benchmark_hold_the_promise_in_processes_of_its_own(tmp_path):
    large, small = tmp_path / "large.json", tmp_path / "small.json"
    code, printed = run_forked(measure, str(large), str(small))
    assert code == 0, printed
    rows = [by_case(json.loads(path.read_text())) for path in (large, small)]
    assert [len(some) for some in rows] == [2, 3 * 2 * 2]
    check_large(rows[0])
    check_small(rows[1])


def measure(large, small):
    """Both in one process, whose rows are processes of one server."""
    selected = ["--stores", "device", "disk", "--averages", "last", "--slot-dtypes", "same"]
    memory.main([*EVERYWHERE, "--json", large, *selected])
    memory.main([*EVERYWHERE, "--json", small, "--quick"])


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
