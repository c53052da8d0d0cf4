"""Where a window lies and what that costs: capture, merge and restore from the device, from host memory and from disk.

    python -m benchmarks.stores [--json FILE] [--quick] [--snapshots 6] [--folder FOLDER] [--device cuda]

The unit of a merge is the `copy_` that moves the same streams, (N + 1) / 2 copies of the model; that of a capture or
a restore is one copy. Merges are also compared with reading the same bytes: all slot files from the page cache into a
small buffer, on as many threads as torch has. A capture to disk is timed twice: until it returns, and until the file
is on the disk, which the next capture waits for.
"""

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Action, Timing, chosen_device, interleave, machine, new_parser, show, write_json
from benchmarks.parameters import llama_tensors
from pretrain_merge.stores.device import DeviceStore
from pretrain_merge.stores.disk import DiskStore
from pretrain_merge.stores.host import HostStore
from pretrain_merge.stores.store import Store

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
READ = "page cache: read the same bytes"
COLUMNS = {
    "store": "store",
    "what": "what",
    "seconds": "seconds",
    "ratio to copy": "ratio_to_copy",
    "lowest": "ratio_lowest",
    "highest": "ratio_highest",
}

Model = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print tables, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = chosen_device(options)
    print(f"{machine(device)}; torch {torch.__version__}")
    rows = []
    for name in options.dtypes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += _measure(name, device, Path(folder), options)
    write_json(options.json, rows)
    return rows


def _measure(dtype: str, device: torch.device, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    live = llama_tensors(DTYPES[dtype], device, shrink=32 if options.quick else 1)
    num_snapshots, rounds = options.snapshots, 3 if options.quick else options.rounds
    stores: dict[str, Store] = {"device": DeviceStore(), "host": HostStore(), "disk": DiskStore(folder)}
    for slot in range(num_snapshots):
        for store in stores.values():
            store.write(slot, live, [DTYPES[dtype]] * len(live))
    label = f"{dtype}, N={num_snapshots}, {sum(t.numel() for t in live.values()) / 2**20:.1f} Mi elements"
    copy = _copy_all(live)
    timed: dict[str, Timing] = {}
    for candidates in (_captures(stores, live, num_snapshots), _merges(stores, live, num_snapshots, folder)):
        timed |= interleave(candidates, copy, rounds=rounds, device=device, label=label)
        for store in stores.values():
            _settle(store)
    rows = _rows(timed, live, dtype, num_snapshots, device)
    merges = [row for row in rows if row["ratio_to_page_cache"] is not None]
    show(label, [row for row in rows if row not in merges], COLUMNS)
    show(label, merges, COLUMNS | {"ratio to reading": "ratio_to_page_cache"})
    for store in stores.values():
        store.clear()
    return rows


def _captures(stores: dict[str, Store], live: Model, num_snapshots: int) -> dict[str, Action]:
    dtypes = [tensor.dtype for tensor in live.values()]

    def capture(store: Store, *, settled: bool) -> Action:
        def write() -> None:
            store.write(num_snapshots - 1, live, dtypes)
            if settled:
                _settle(store)

        return write

    candidates = {f"{name}: capture": capture(store, settled=False) for name, store in stores.items()}
    # last, so that no other capture runs beside the writing
    return candidates | {"disk: capture and wait for the disk": capture(stores["disk"], settled=True)}


def _merges(stores: dict[str, Store], live: Model, num_snapshots: int, folder: Path) -> dict[str, Action]:
    out, slots = list(live.values()), range(num_snapshots)
    coefficients = [1 / num_snapshots] * num_snapshots
    candidates: dict[str, Action] = {READ: _read_files(sorted(folder.glob("slot-*.safetensors")))}
    for name, store in stores.items():
        candidates |= {
            f"{name}: merge": lambda store=store: store.merge_(out, slots, coefficients),
            f"{name}: merge with spread": lambda store=store: store.merge_(out, slots, coefficients, spread=True),
            f"{name}: restore": lambda store=store: store.read_(out, num_snapshots - 1),
        }
    return candidates


def _read_files(paths: list[Path]) -> Action:
    def read(path: Path) -> None:
        buffer = memoryview(bytearray(2**18))  # stays in the core's own cache
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def read_all() -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(read, paths))

    return read_all


def _settle(store: Store) -> None:
    """Wait until nothing of a capture is still going on."""
    if isinstance(store, DiskStore):
        store._finish()
    if isinstance(store, HostStore):
        store._wait()


def _copy_all(live: Model) -> Action:
    sources = list(live.values())
    targets = [torch.empty_like(tensor) for tensor in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


def _rows(
    timed: dict[str, Timing], live: Model, dtype: str, num_snapshots: int, device: torch.device
) -> list[dict[str, Any]]:
    rows = []
    for name, timing in timed.items():
        store, what = name.split(": ")
        is_merge = what.startswith("merge")
        streams = num_snapshots + 1 if is_merge else num_snapshots if name == READ else 2
        rows.append(
            {
                "store": store,
                "what": what,
                "dtype": dtype,
                "n": num_snapshots,
                "seconds": timing.median,
                "ratio_to_copy": timing.ratio / (streams / 2),
                "ratio_lowest": min(timing.ratios) / (streams / 2),
                "ratio_highest": max(timing.ratios) / (streams / 2),
                "ratio_to_page_cache": timing.times_slower_than(timed[READ]) if is_merge or name == READ else None,
                "elements": sum(tensor.numel() for tensor in live.values()),
                "rounds": len(timing.seconds),
                "machine": machine(device),
                "torch": torch.__version__,
            }
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("stores", __doc__)
    parser.add_argument("--quick", action="store_true", help="a thousandth of the model, three rounds")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--snapshots", type=int, default=6, metavar="N")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    return parser


if __name__ == "__main__":
    main()
