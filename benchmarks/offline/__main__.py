"""The command line.

    python -m benchmarks.offline [--json FILE] [--quick] [--folder FOLDER] [--mergekit COMMAND] [--rounds N] [--kills N]

Eight checkpoints of a 220M Llama in bfloat16 (440 MB each) are written as Hugging Face folders, Lightning checkpoints
and DCP folders; each candidate merges them in a process of its own, in turns. The yardstick is `cat` of the inputs to
nowhere and a synced copy of one: what any merge must move. Files are in the page cache. `seconds` are wall time of
the whole process, `cpu_seconds` those of all its threads, `peak_mib` its largest resident set, imports included.

With `--mergekit` (the path of its `mergekit-yaml`) that merges the same folders by `linear`, and a small model of three
dtypes whose results are compared bit for bit; without it, they are compared with sums in float64 only.

With `--kills` a merge, and a sweep, is killed (SIGKILL) at random moments and run again until it ends: no folder may
look complete and not be, and the bytes must be those of an undisturbed one. `--rounds 0` times nothing. Exits with 1
where a bit or a byte is another.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, new_parser, show, write_json
from benchmarks.offline.checkpoints import write_checkpoints
from benchmarks.offline.kills import killed
from benchmarks.offline.mergekit import agreement
from benchmarks.offline.timed import timed

COLUMNS = {
    "what": "what", "seconds": "seconds", "of yardstick": "of_yardstick", "of torch": "of_import",
    "of safetensors": "of_safetensors", "CPU seconds": "cpu_seconds", "peak MiB": "peak_mib",
}  # fmt: skip
SUMS = {"what": "what", "elements": "elements", "other bytes than mergekit": "other_bits", "largest error, ulp": "ulps"}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the tables, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    about = {"machine": machine(torch.device("cpu")), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        elements = write_checkpoints(folder, quick=options.quick)
        times = timed(folder, options.rounds, options.mergekit) if options.rounds else []
        if times:
            show(f"8 checkpoints of {elements / 1e6:.0f}M parameters, median of {options.rounds}", times, COLUMNS)
        sums = agreement(folder, options.mergekit)
        if options.mergekit is None:
            print("mergekit was not named (--mergekit): its bits are not compared.")
        show("sums of 2, 4 and 8 tensors", sums, SUMS)
        kills = killed(folder, options.kills) if options.kills else []
    rows = [row | about for row in [*({**row, "elements": elements} for row in times), *sums, *kills]]
    write_json(options.json, rows)
    if any(row.get("wrong") or row.get("other_bits") for row in rows):
        sys.exit(1)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("offline", __doc__)
    parser.add_argument("--quick", action="store_true", help="a model of 1M parameters")
    parser.add_argument("--folder", help="where 11 GB go for a while (default: the system's temporary folder)")
    parser.add_argument("--mergekit", metavar="COMMAND", help="path of mergekit-yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
