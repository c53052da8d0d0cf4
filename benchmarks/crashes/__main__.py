"""The command line.

    python -m benchmarks.crashes [--json FILE] [--quick | --chosen] [--recoveries] [--processes N] [--kills N] ...

A run trains in a child process, or in two that form a group. It is killed (SIGKILL) at random moments and before or
after random calls of a save, a merge or a checkpoint, and resumed from the newest or an older checkpoint until it ends.
The same with SIGTERM (to both processes, as a launcher sends it, which kills what has not ended by it), with a limit on
the size of files that stands for a full disk, and with random bytes changed in its files.
Exits with 1 where anything differs or a file cannot be explained.
"""

import argparse
import logging
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.crashes.corruption import corrupted
from benchmarks.crashes.full_disk import filled
from benchmarks.crashes.rows import COLUMNS, Row, totals
from benchmarks.crashes.run import Reference
from benchmarks.crashes.signals import broken_at_chosen_moments, broken_at_random
from benchmarks.crashes.training import CHOSEN, RECOVERING, SETTINGS
from benchmarks.measure import machine, new_parser, show, write_json
from pretrain_merge.kernels.weighted_sum import weighted_sum_

_MANY = {"kills": 200, "terms": 50, "full_disks": 24, "corruptions": 200}
_FEW = {"kills": 6, "terms": 6, "full_disks": 3, "corruptions": 6}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Break runs, print the counts, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # before any fork: threads do not live on in a child
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "pretrain_merge"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    weighted_sum_([torch.zeros(1)], [[torch.zeros(1)]], [1.0])  # compiled once, and not in every child
    start = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for row in _rows(Path(folder), options):
            print(f"{time.monotonic() - start:.0f} s: {row.plain()}", *row.details, sep="\n", flush=True)
            rows.append(row)
    sums = [row.plain() for row in totals(rows)]
    show(f"{time.monotonic() - start:.0f} s, seed {options.seed}", sums, COLUMNS)
    for row in sums:
        print(*(f"{row['what']}: {count} {figure}" for figure, count in sorted(row["figures"].items())), sep="\n")
    about = {"machine": machine(torch.device("cpu")), "torch": torch.__version__, "seed": options.seed}
    plain = [row.plain() | about for row in rows]
    write_json(options.json, plain)
    return plain


def _rows(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    settings = [CHOSEN[options.processes]] if options.chosen else SETTINGS[options.processes]
    settings = RECOVERING[options.processes] if options.recoveries else settings
    references = [Reference.made(setting, folder / f"reference-{i}" / "run") for i, setting in enumerate(settings)]
    if options.chosen:
        yield broken_at_chosen_moments(references[0], folder / "run")
        return
    chance = random.Random(options.seed)
    amounts = {name: getattr(options, name) for name in _MANY}
    amounts = {
        name: amount if amount is not None else (_FEW if options.quick else _MANY)[name]
        for name, amount in amounts.items()
    }
    for reference, share in _shared(references, amounts["kills"]):
        yield broken_at_random(reference, folder / "run", chance, signal.SIGKILL, share)
    if options.recoveries:
        return  # where the disk fills up, and what is damaged, the other settings tell
    for reference, share in _shared(references, amounts["terms"]):
        yield broken_at_random(reference, folder / "run", chance, signal.SIGTERM, share)
    if options.processes > 1:
        return  # full disks and damage are of files that one process writes
    yield filled(references, folder / "run", chance, amounts["full_disks"])
    for reference, share in _shared(references, amounts["corruptions"]):
        yield corrupted(reference, folder / "run", chance, share)


def _shared(references: list[Reference], amount: int) -> list[tuple[Reference, int]]:
    whole, rest = divmod(amount, len(references))
    return [(reference, whole + (index < rest)) for index, reference in enumerate(references)]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("faults", __doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--chosen", action="store_true", help="kills at the same moments every time, and nothing else")
    parser.add_argument("--recoveries", action="store_true", help="SIGKILLs of runs that diverge and are taken back")
    parser.add_argument("--processes", type=int, choices=sorted(SETTINGS), default=1, help="of a run (default: 1)")
    parser.add_argument("--kills", type=int, help="SIGKILLs, over all settings (default: 200)")
    parser.add_argument("--terms", type=int, help="SIGTERMs (default: 50)")
    parser.add_argument("--full-disks", type=int, help="times that the disk fills up (default: 24)")
    parser.add_argument("--corruptions", type=int, help="files that are damaged (default: 200)")
    parser.add_argument("--folder", type=Path, help="where runs go (default: the system's temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(any(row["differences"] or row["unexplained"] for row in main()))
