"""Every benchmark is one command that prints a table and writes one JSON list, with the keys that notes and CI read."""

import json
import math
import runpy
import sys

import pytest
from harness.forks import run_forked

from benchmarks.measure import Timing
from benchmarks.rates import rates_of_rounds

ALWAYS = {"machine", "torch", "elements"}
RATIOS = {"seconds", "ratio_to_copy"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a benchmark as its reader would; returns its rows and what it printed."""

    def run_benchmark(name, *arguments):
        path = tmp_path_factory.mktemp("rows") / f"{name}.json"
        command = [f"benchmarks.{name}", *arguments, "--json", str(path), "--threads", "1", "--device", "cpu"]
        code, printed = run_forked(run_module, *command, timeout=110)
        assert code == 0, printed
        rows = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert isinstance(rows, list)
        assert all(row.keys() >= ALWAYS for row in rows)
        return rows, printed

    return run_benchmark


def run_module(name, *arguments):
    """What `python -m` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def numbers(rows, *keys):
    return [row[key] for row in rows for key in keys]


def check_ratios(rows):
    assert all(RATIOS | {"ratio_lowest", "ratio_highest", "rounds"} <= row.keys() for row in rows)
    assert all(math.isfinite(number) and number > 0 for number in numbers(rows, *RATIOS))
    assert all(row["ratio_lowest"] <= row["ratio_to_copy"] <= row["ratio_highest"] for row in rows)


def test_merge_kernel(run):
    small = ["--elements", "4096", "--snapshots", "3", "--rounds", "2", "--skip-model", "--dtypes", "bfloat16"]
    rows, printed = run("merge_kernel", *small)
    check_ratios(rows)
    assert {"backend", "dtype", "n"} <= rows[0].keys()
    assert {row["n"] for row in rows} == {3}
    peers = {"swa_utils, avg_fn", "swa_utils, multi_avg_fn", "Lightning EMAWeightAveraging", "stack, as mergekit"}
    assert {"ours: cpu", "ours: reference", "foreach chain, float32 sums"} | peers <= {row["backend"] for row in rows}
    assert "ratio to copy" in printed


def test_growth(run):
    rows, printed = run("growth", "--quick")
    assert {"what", "size", "measured", "unit", "before", "at_most"} <= rows[0].keys()
    whats = [row["what"] for row in rows]
    assert len(set(whats)) >= 8
    assert all(math.isfinite(number) and number >= 0 for number in numbers(rows, "measured"))
    assert "one forecast at a merge" in printed


def test_capture(run):
    rows, printed = run("capture", "--quick")
    check_ratios(rows)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {"capture", "capture with finite check", "finite check", "block: next sample"} <= {
        row["what"] for row in rows
    }
    assert "capture with finite check" in printed


def test_stores(run, tmp_path):
    rows, printed = run("stores", "--quick", "--snapshots", "3", "--folder", str(tmp_path))
    check_ratios(rows)
    done = {(row["dtype"], row["store"], row["what"]) for row in rows}
    for dtype in ("float32", "bfloat16"):
        for store in ("device", "host", "disk"):
            assert {(dtype, store, what) for what in ("capture", "merge", "merge with spread", "restore")} <= done
    to_page_cache = {row["what"]: row["ratio_to_page_cache"] for row in rows if row["store"] == "disk"}
    assert to_page_cache["merge"] > 0
    assert to_page_cache["capture"] is None
    assert "ratio to reading" in printed
    assert list(tmp_path.iterdir()) == []


def test_evaluation(run):
    pytest.importorskip("transformers")
    rows, printed = run("evaluation", "--quick")
    assert [row["what"] for row in rows] == ["memento", "putting back", "per evaluation"]
    assert all(0 < row["share"] < math.inf for row in rows)
    assert "of an evaluation" in printed


def test_overhead(run):
    rows, printed = run("overhead", "--quick", "--length", "8")
    overheads = [row for row in rows if row["kind"] == "overhead"]
    costs = {row["what"]: row for row in rows if row["kind"] == "cost"}
    assert [row["what"] for row in overheads] == ["snapshots", "snapshots and merges", "blocks, every 10th step"]
    for row in overheads:
        assert row["steps_per_second_with"] > 0 < row["steps_per_second_without"]
        assert row["num_snapshots"] == 2
        assert row["pairs"] == 18  # of blocks of one step, but for the two with a snapshot
        assert 0 < row["uncertainty"] < math.inf
        assert 0 < row["overhead_in_hooks"] < math.inf
        assert math.isfinite(row["overhead"])
        assert 0 < row["idle_microseconds"] < 1e5
    assert costs.keys() == {"training step", "snapshot", "merge and restore"}
    assert costs["training step"]["ratio_to_step"] == 1
    assert all(math.isfinite(number) and number > 0 for number in numbers(costs.values(), *RATIOS, "ratio_to_step"))
    assert "a snapshot every 20 steps" in printed


def test_plan(run, tmp_path):
    rows, printed = run("plan", "--quick", "--snapshots", "3", "--folder", str(tmp_path))
    done = {(row["what"], row["dtype"], row["configuration"]) for row in rows}
    assert {
        ("capture", dtype, f"{store}, last") for dtype in ("float32", "bfloat16") for store in ("device", "disk")
    } <= done
    assert ("merge", "float32", "device, last, bfloat16") in done
    assert ("sample", "bfloat16", "device, block") in done
    assert ("evaluation", "float32", "device, last") in done
    for row in rows:
        assert 0 < row["ratio_lowest"] <= row["ratio_to_predicted"] <= row["ratio_highest"] < math.inf
        assert row["predicted_seconds"] > 0 < row["seconds"]
        assert row["what"] == "evaluation" or row["memory_rate"] > 0
    assert "predicted" in printed
    assert "pretrain-merge plan --measured.memory_rate " in printed
    assert list(tmp_path.iterdir()) == []


def test_a_rate_of_arithmetic_is_what_a_copy_of_the_same_bytes_does_not_explain():
    seconds = {"cached copy": 0.8, "cached check": 0.9, "cached rounding": 0.5}
    timed = {name: Timing((value,), (2.0,)) for name, value in seconds.items()}
    (figures,) = rates_of_rounds(timed, 10**9, 4, 2)
    elements = 2**16 * 64
    assert figures.memory_rate == 10**9
    assert figures.check_rate == pytest.approx(elements / (0.9 - 0.4))  # reads half of what a copy moves
    assert figures.rounding_rate is None  # 0.6 s of moving, so nothing is left
    assert figures.file_rate is None


# `memory` is run by test_memory.py, which also holds its figures to the promise.


def test_scale(run):
    rows, printed = run("scale", "--quick", "--processes", "1", "2")
    assert [row["processes"] for row in rows] == [1, 2]
    assert all(row["collectives"] == 0 for row in rows)
    assert all(math.isfinite(number) and number > 0 for number in numbers(rows, "merge_ms", "copy_ms", "ratio"))
    assert len({row["planned_mib"] for row in rows}) == 1
    assert "collectives" in printed
