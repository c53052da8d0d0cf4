"""Train and measure what is missing of a question: `python -m benchmarks.restart --question optimizer`."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.annealing import texts
from benchmarks.measure import provenance
from benchmarks.restart import records
from benchmarks.restart.loop import Followed
from benchmarks.restart.questions import QUESTIONS, corpus
from benchmarks.restart.setups import AFTER, SEEDS, trunk_of

_QUICK_STEPS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.report:
        _report(options.out)
        return
    for seed in options.only or SEEDS:  # questions of a seed share its trunk
        for question in options.question or QUESTIONS:
            path = records.path_of(options.out, question, seed)
            if options.list or path.exists():
                print(f"{path.stem}: {'done' if path.exists() else 'missing'}", flush=True)
                continue
            _measure(question, seed, path, quick=options.quick)


def _measure(question: str, seed: int, path: Path, *, quick: bool) -> None:
    started = time.process_time()
    setup = trunk_of(question, seed, quick=quick)
    found = QUESTIONS[question](setup, _QUICK_STEPS if quick else AFTER)
    seconds = time.process_time() - started
    arms = {name: _arm(arm) for name, arm in found.items()}
    about = provenance("benchmarks.restart", texts.digest(corpus(setup.text))) | {"seconds": round(seconds, 1)}
    records.write(path, records.Result(question, seed, setup.describe(), arms), about)
    print(time.strftime("%H:%M:%S"), f"{path.stem}: {len(arms)} arms, {seconds:.0f} s of CPU", flush=True)


def _arm(found: Followed) -> records.Arm:
    tail = found.tail if found.tail == found.tail else None  # JSON has no NaN
    return records.Arm(found.losses, found.other_losses, records.curve(found.norms), tail, found.died)


def _report(folder: Path) -> None:
    """The page's tables and figures."""
    from benchmarks.restart import page, picture  # matplotlib is slow to import

    results = records.read_all(folder)
    page.PAGE.write_text(page.written(page.PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for name, figure in picture.FIGURES.items():
        figure(results).savefig(page.PAGE.parent / "assets" / f"{name}.png")
    print(f"{len(results)} results; wrote {page.PAGE} and its figures")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--question", nargs="+", choices=list(QUESTIONS), help="all of them, where none is named")
    parser.add_argument("--only", nargs="*", type=int, default=[], metavar="SEED", help="these seeds alone")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder of the results; what it holds is kept")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; choose another --out")
    parser.add_argument("--report", action="store_true", help="write the page's tables and figures from what there is")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
