"""Train and measure what is missing, one run after another: `python -m benchmarks.ablations [--only NAME ...]`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from benchmarks.ablations import page, picture, records, rules, training
from benchmarks.ablations.setups import RUNS, Run
from benchmarks.annealing import texts
from benchmarks.measure import provenance, show


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.report:
        _report(records.read_all(options.out))
        return
    corpus = cache(lambda name: texts.TEXTS[name]())
    for run in _chosen(options.only):
        path = options.out / f"{run.name}.json"
        if options.list or path.exists():
            print(f"{run.name}: {'done' if path.exists() else 'missing'}", flush=True)
            continue
        result = training.train(run, corpus(run.text), lambda text: print(_now(), text, flush=True))
        records.write(path, run.describe(), result, _about(texts.digest(corpus(run.text))))
        print(_now(), f"{run.name}: {sum(result['seconds'].values()):.0f} s of CPU", flush=True)


def _report(results: Sequence[records.Result]) -> None:
    """The page's tables and figures, and the table of rules for a reader of the terminal."""
    page.PAGE.write_text(page.written(page.PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for name, figure in picture.FIGURES.items():
        figure(results).savefig(page.PAGE.parent / "assets" / f"{name}.png")
    rows = rules.table(rules.regrets(results, rules.CHOICES))
    headings = {"rule": "rule", "mean": "mean", "worst": "max", "worst at": "worst_at", "n": "n"}
    show("Percent of the loss that a rule loses to the best of all spans", rows, headings)
    print(f"{len(results)} runs; wrote {page.PAGE} and its figures")


def _chosen(names: Sequence[str]) -> list[Run]:
    known = {run.name: run for run in RUNS}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{', '.join(unknown)}: no such run. Known: {', '.join(known)}.")
    return [known[name] for name in names] if names else list(RUNS)


def _about(text_digest: str) -> dict[str, str]:
    return provenance("benchmarks.ablations", text_digest, "lightning", "transformers")


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder of the results; what it holds is kept")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these runs alone")
    parser.add_argument("--report", action="store_true", help="write the page's tables and figures from what there is")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
