"""Train what is missing of the suite, one run after another: `python -m benchmarks.annealing [--only NAME ...]`."""

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.annealing import design, random_runs, records, texts, training
from benchmarks.annealing.setups import FRESH, SUITE, Setup
from benchmarks.measure import provenance
from pretrain_merge.demo.corpus import Corpus


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("pretrain_merge").setLevel(logging.ERROR)  # views that wait for their first snapshots
    corpus = cache(lambda name: texts.TEXTS[name]())
    if options.random:
        _train_random(options, corpus)
        return
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


def _train_random(options: argparse.Namespace, corpus: Callable[[str], Corpus]) -> None:
    """What is missing of the random design, in its order: an interrupted suite is a smaller one."""
    for run in design.draws():
        path = (options.out or records.RANDOM_FOLDER) / f"{run.name}.json"
        if options.only and run.name not in options.only:
            continue
        if options.list or path.exists():
            print(f"{run.name}: {'done' if path.exists() else 'missing'}, about {run.seconds:.0f} s", flush=True)
            continue
        if options.quick:
            run = dataclasses.replace(run, num_steps=240, warmup_steps=20)
        other = corpus(run.shifted_to) if run.shifted_to else None
        result = random_runs.train(run, corpus(run.text), other, lambda text: print(_now(), text, flush=True))
        records.write_random_run(path, run.describe(), result, _about(texts.digest(corpus(run.text))))
        print(_now(), f"{run.name}: {sum(result['seconds'].values()):.0f} s of CPU", flush=True)


def _chosen(setups: Sequence[Setup], names: Sequence[str]) -> list[Setup]:
    known = {setup.name: setup for setup in setups}
    for name in names:
        if name not in known:
            sys.exit(f"{name!r} is no run of the suite. Known: {', '.join(known)}.")
    return [known[name] for name in names] if names else list(setups)


def _about(text_digest: str) -> dict[str, str]:
    return provenance("benchmarks.annealing", text_digest, "lightning", "transformers")


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.annealing", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; what it holds is kept")
    parser.add_argument("--fresh", action="store_true", help="the runs that nothing was fitted to, in their own folder")
    parser.add_argument("--random", action="store_true", help="the runs of the random design, in theirs")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these runs alone")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--quick", action="store_true", help="runs of 240 steps, to see that all of it works")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
