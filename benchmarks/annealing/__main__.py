"""Train what is missing of the suite, one run after another: `python -m benchmarks.annealing [--only NAME ...]`."""

import argparse
import dataclasses
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.annealing import records, texts, training
from benchmarks.annealing.setups import FRESH, SUITE, Setup
from benchmarks.measure import machine


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("pretrain_merge").setLevel(logging.ERROR)  # views that wait for their first snapshots
    corpus = cache(lambda name: texts.TEXTS[name]())
    out = options.out or (records.FRESH_FOLDER if options.fresh else records.FOLDER)
    for setup in _chosen(FRESH if options.fresh else SUITE, options.only):
        path = out / f"{setup.name}.json"
        if options.list or path.exists():
            print(f"{setup.name}: {'done' if path.exists() else 'missing'}", flush=True)
            continue
        if options.quick:
            setup = dataclasses.replace(setup, num_steps=240, warmup_steps=10, num_validation_blocks=64)
        result = training.train(setup, corpus(setup.text), lambda text: print(_now(), text, flush=True))
        records.write_run(path, setup.describe(), result, _about(texts.digest(corpus(setup.text))))
        seconds = sum(result["seconds"].values())
        print(_now(), f"{setup.name}: {len(result['anneals'])} anneals, {seconds:.0f} s of CPU", flush=True)


def _chosen(setups: Sequence[Setup], names: Sequence[str]) -> list[Setup]:
    known = {setup.name: setup for setup in setups}
    for name in names:
        if name not in known:
            sys.exit(f"{name!r} is no run of the suite. Known: {', '.join(known)}.")
    return [known[name] for name in names] if names else list(setups)


def _about(text_digest: str) -> dict[str, str]:
    return {
        "command": shlex.join(["python", "-m", "benchmarks.annealing", *sys.argv[1:]]),
        "text_digest": text_digest,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "transformers", "pretrain-merge")},
        "machine": machine(torch.device("cpu")),
    }


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.annealing", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; what it holds is kept")
    parser.add_argument("--fresh", action="store_true", help="the runs that nothing was fitted to, in their own folder")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these runs alone")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--quick", action="store_true", help="runs of 240 steps, to see that all of it works")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
