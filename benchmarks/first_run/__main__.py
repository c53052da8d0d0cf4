"""Train what is missing, then say whether what the README promises holds: `python -m benchmarks.first_run`."""

import argparse
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_run import runs
from benchmarks.measure import machine, show, write_json
from pretrain_merge.demo.corpus import load_corpus

_HEADINGS = {
    "lines": "lines",
    "view": "view",
    "model": "family",
    "rate": "lr",
    "runs": "runs",
    "merged below raw": "share",
    "of": "merges",
    "above at worst": "above_at_worst",
    "at the end": "at_end",
    "holds": "holds",
}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = {"torch": version("torch"), "machine": machine(torch.device("cpu"))}
    corpus = load_corpus()
    for run in [] if options.table else runs.missing(options.runs):
        started = time.process_time()
        points = runs.train(run, corpus)
        runs.append(options.runs, run, points, about | {"seconds": round(time.process_time() - started, 1)})
        print(time.strftime("%H:%M:%S"), run, flush=True)
    rows = runs.verdicts(options.runs)
    percent = ("share", "above_at_worst", "at_end")
    shown = [{**row, **{key: f"{100 * row[key]:.2f}%" for key in percent}} for row in rows]
    show("Merged against raw on the same batches, past the first quarter and the first tenth", shown, _HEADINGS)
    write_json(options.json, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_run", description=__doc__)
    parser.add_argument("--runs", type=Path, default=runs.FILE, help="where runs are kept; what it holds is not redone")
    parser.add_argument("--table", action="store_true", help="the table alone, of the runs there are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as one JSON list, in fractions")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
