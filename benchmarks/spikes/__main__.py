"""Train what is missing and say what the detector makes of it: `python -m benchmarks.spikes [--report]`."""

import argparse
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.annealing import texts
from benchmarks.recovery.divergences import ALL, Divergence, steps
from benchmarks.spikes.runs import COLLAPSING, DEFINITIONS, STABLE, Run, recorded, seeded, trained
from benchmarks.spikes.scores import score
from pretrain_merge.demo.corpus import Corpus

_TOLD_OF = {"loss": False, "loss and gradient norm": True}
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
    groups = {kind: [name for name in runs if name.startswith(kind)] for kind in ("rate", "shock")}
    groups |= {"others": [name for name in runs if name not in groups["rate"] + groups["shock"]], "all": list(runs)}
    print("| told of | runs | collapse | stable steps | false alarms | per 1,000 | seen within 15 | within 25 |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, with_norm), definition, (group, names) in product(_TOLD_OF.items(), DEFINITIONS, groups.items()):
        found = score({name: runs[name] for name in names}, with_norm=with_norm, definition=definition)
        num = len(found.delays)
        print(
            f"| {name} | {group} ({len(names)}) | {definition} | {found.num_stable} | {found.num_false} | "
            f"{found.per_thousand:.2f} | {found.within(15)} of {num} | {found.within(25)} of {num} |"
        )


def _train(out: Path, seeds: int) -> None:
    @cache
    def corpus(text: str) -> Corpus:
        return texts.TEXTS[text]()

    out.mkdir(parents=True, exist_ok=True)
    for divergence in ALL:
        _keep(out, divergence.name, partial(_taken, divergence, corpus))
    for runs, until_collapse in ((STABLE, False), (COLLAPSING, True)):
        for run in seeded(runs, seeds):
            _keep(out, run.name, partial(_trained, run, corpus, until_collapse))


def _taken(divergence: Divergence, corpus: Callable[[str], Corpus]) -> NDArray[np.float32]:
    return recorded(steps(divergence, corpus("stdlib")), until_collapse=True)


def _trained(run: Run, corpus: Callable[[str], Corpus], until_collapse: bool) -> NDArray[np.float32]:
    return trained(run, corpus(run.text), until_collapse=until_collapse)


def _keep(out: Path, name: str, made: Callable[[], NDArray[np.float32]]) -> None:
    path = out / f"{name}.npz"
    if not path.exists():
        np.savez_compressed(path, steps=made())
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
