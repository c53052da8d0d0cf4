"""Train what is missing and say what the detector makes of it: `python -m benchmarks.spikes [--report]`."""

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.annealing import texts
from benchmarks.spikes.runs import COLLAPSING, STABLE, seeded, trained
from benchmarks.spikes.scores import score
from pretrain_merge.demo.corpus import Corpus

RECORDS = Path(__file__).parent / "records"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spikes", description=__doc__)
    parser.add_argument("--report", action="store_true", help="train nothing, read what is there")
    parser.add_argument("--seeds", type=int, default=4, help="of each kind of run")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records; what it holds is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        _train(options.out, options.seeds)
    runs = {path.stem: np.load(path)["steps"] for path in sorted(options.out.glob("*.npz"))}
    print("| told of | stable steps | false alarms | per 1,000 | collapses | within 15 steps | within 25 |")
    print("|---|---|---|---|---|---|---|")
    for name, with_norm in (("loss", False), ("loss and gradient norm", True)):
        found = score(runs, with_norm=with_norm)
        print(
            f"| {name} | {found.num_stable} | {found.num_false} | {found.per_thousand:.2f} | {len(found.delays)} | "
            f"{found.within(15)} | {found.within(25)} |"
        )


def _train(out: Path, seeds: int) -> None:
    @cache
    def corpus(text: str) -> Corpus:
        return texts.TEXTS[text]()

    out.mkdir(parents=True, exist_ok=True)
    for runs, until_collapse in ((STABLE, False), (COLLAPSING, True)):
        for run in seeded(runs, seeds):
            path = out / f"{run.name}.npz"
            if not path.exists():
                np.savez_compressed(path, steps=trained(run, corpus(run.text), until_collapse=until_collapse))
                print(f"{run.name}: done", flush=True)


if __name__ == "__main__":
    main()
