"""Merge time and window bytes per rank on 1, 2 and 4 processes, with a shard of one size each: both should be flat.

    python -m benchmarks.scale [--json FILE] [--quick] [--processes 1 2 4] [--elements 16777216] [--snapshots 10]

Each process holds its FSDP2 shard of a model that grows with their number, and computes with one thread. All of them
measure at the same time. In every round each first copies as many bytes as its merge moves, then merges and puts raw
back; `ratio` is merge / copy in the same process and round, since more processes than cores, or than memory has
bandwidth for, slow down both alike. Collectives during merges are counted, not assumed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.measure import machine, new_parser, show, write_json
from pretrain_merge import RollingMerger, parameters
from pretrain_merge.cadence import Quantity
from pretrain_merge.plan import HARDWARE, Layout, Merging, Model, Question, Training, make_plan

COLUMNS = {
    "processes": "processes",
    "merge ms": "merge_ms",
    "copy ms": "copy_ms",
    "ratio": "ratio",
    "lowest": "ratio_lowest",
    "highest": "ratio_highest",
    "window MiB": "window_mib",
    "planned MiB": "planned_mib",
    "collectives": "collectives",
}
_WIDTH = 1024
_TENSORS = 8


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    elements = 2**16 if options.quick else options.elements
    print(f"{machine(torch.device('cpu'))}; torch {torch.__version__}; one thread per process")
    rows = [
        _row(processes, elements, 3 if options.quick else options.rounds, options) for processes in options.processes
    ]
    show(f"window of {options.snapshots}, shard of {elements / 2**20:.3g} Mi float32 elements", rows, COLUMNS)
    write_json(options.json, rows)
    return rows


def _row(processes: int, elements: int, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job = (processes, elements, options.snapshots, rounds, folder)
        # forked, since importing torch takes longer than a small measurement; nothing here has computed yet
        torch.multiprocessing.start_processes(_measure, args=job, nprocs=processes, start_method="fork")  # type: ignore[no-untyped-call]
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    ratios = [statistics.median(own["ratios"]) for own in ranks]
    shape = (elements // _WIDTH // _TENSORS * processes, _WIDTH)
    model = Model("measured", (shape,) * _TENSORS, processes * elements)
    merging = Merging(Quantity(1), window=options.snapshots, views=(options.snapshots,), store="device")
    question = Question(model, Layout(shard=processes), HARDWARE["cpu"], merging, Training(1, 1, step_seconds=1.0))
    return {
        "processes": processes,
        "merge_ms": 1e3 * statistics.median(own["merge"] for own in ranks),
        "copy_ms": 1e3 * statistics.median(own["copy"] for own in ranks),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "window_mib": max(own["window_bytes"] for own in ranks) / 2**20,
        "planned_mib": make_plan(question).window_bytes / 2**20,
        "collectives": sum(own["collectives"] for own in ranks),
        "elements": elements,
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
    }


class _Matrices(nn.Module):
    """A model that is nothing but matrices whose rows divide evenly."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        rows = elements // _WIDTH // _TENSORS
        self.matrices = nn.ParameterList(torch.randn(rows, _WIDTH) for _ in range(_TENSORS))


def _measure(rank: int, processes: int, elements: int, num_snapshots: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(minutes=10))
    module = fully_shard(_Matrices(elements * processes), mesh=init_device_mesh("cpu", (processes,)))
    merger = RollingMerger(window=num_snapshots, every=1, store="device")
    before = _resident()
    for step in range(1, num_snapshots + 1):
        merger.observe(module, step)
    window_bytes = _resident() - before

    # a copy reads and writes; a merge reads every snapshot and writes once, and raw is read and written after it
    moved = (num_snapshots + 1 + 2) * sum(shard.nbytes for shard in parameters.mergeable_tensors(module).values())
    source = torch.randn(moved // 2 // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    times: dict[str, list[float]] = {"copy": [], "merge": []}
    with CommDebugMode() as communicated:
        _merge(merger, module)
    for _ in range(rounds):
        for name, act in (("copy", lambda: target.copy_(source)), ("merge", lambda: _merge(merger, module))):
            dist.barrier()
            start = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - start)
    ratios = [merge / copy for merge, copy in zip(times["merge"], times["copy"], strict=True)]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    collectives = communicated.get_total_counts()
    result = {"ratios": ratios, "window_bytes": window_bytes, "collectives": collectives} | medians
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort a plain exit


def _merge(merger: RollingMerger, module: nn.Module) -> None:
    with merger.merged(module, "sma"):
        pass


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("scale", __doc__)
    parser.add_argument("--quick", action="store_true", help="a small shard, three rounds")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="W")
    parser.add_argument("--elements", type=int, default=2**24, help="of one rank's shard")
    parser.add_argument("--snapshots", type=int, default=10, metavar="N")
    parser.add_argument("--rounds", type=int, default=15)
    return parser


if __name__ == "__main__":
    main()
