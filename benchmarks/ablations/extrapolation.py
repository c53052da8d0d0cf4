"""Does going on along the line from an older mean to a newer one pay? `python -m benchmarks.ablations.extrapolation`.

Two plain means of equally many snapshots 1% apart, one behind the other or with a span left out between, and steps
along the line through them (Extra-Merge, arXiv 2605.26484), beside plain means of all spans at the same step. One seed
of each family; what is measured is kept as the ablations keep theirs.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.ablations import records, training
from benchmarks.ablations.merges import NESTED, Merge, Plan
from benchmarks.ablations.setups import BETWEEN, RUNS, STAGES, Run
from benchmarks.annealing import texts
from benchmarks.annealing.training import SuiteModel
from benchmarks.measure import provenance
from pretrain_merge import coefficients
from pretrain_merge.demo.corpus import Corpus
from pretrain_merge.demo.fitting import quiet
from pretrain_merge.demo.models import constant_after_warmup

FOLDER = Path(__file__).with_name("extrapolated")
MEASURED = ("dense-0", "moe-0")
_NUMBERS = (5, 7, 10, 12, 16, 21)
_BACK = (1, 2)  # from one mean to the other, in spans
_STEPS = (0.1, 0.2, 0.3)


def merges(run: Run) -> dict[int, list[Merge]]:
    """Everything that is measured, by step."""
    plan = Plan(run.unit)
    found = {}
    for units in (*STAGES, *BETWEEN):
        points = plan.shared_points(units * run.unit)
        plain = [
            Merge("sma", 0, number, number, tuple(points[-number:]), coefficients.sma(number))
            for number in NESTED
            if number <= len(points)
        ]
        found[points[-1]] = [Merge("raw", 0, 1, 1, (points[-1],), (1.0,)), *plain, *_along_lines(points)]
    return found


def _along_lines(points: list[int]) -> Iterator[Merge]:
    for number in _NUMBERS:
        for back in _BACK:
            used = number * (back + 1)
            for step in _STEPS if used <= len(points) else ():
                older, newer = (-step / number,) * number, ((1.0 + step) / number,) * number
                weights = (*older, *(0.0,) * (number * (back - 1)), *newer)
                yield Merge(f"extra {back} {step}", 0, number, used, tuple(points[-used:]), weights)


def _measured(run: Run, corpus: Corpus) -> dict[str, object]:
    module = SuiteModel(run, constant_after_warmup(run.warmup_steps))
    plan = merges(run)
    stored = {step for group in plan.values() for merge in group for step in merge.steps}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        models = training.constant_rate(run, corpus, Path(folder) / "branch.ckpt", stored)
    scale = training.Scale(module, corpus, run)
    rows = {step: training.measure(scale, models, group) for step, group in plan.items()}
    parameters = sum(value.numel() for value in module.parameters())
    return {"parameters": parameters, "constant": rows, "decay": {}, "routing": {}, "seconds": {}}


def main() -> None:
    """Train and measure what is missing."""
    torch.set_num_threads(1)
    for run in RUNS:
        path = FOLDER / f"{run.name}.json"
        if run.name not in MEASURED or path.exists():
            continue
        corpus = texts.TEXTS[run.text]()
        about = provenance("benchmarks.ablations.extrapolation", texts.digest(corpus), "lightning", "transformers")
        records.write(path, run.describe(), _measured(run, corpus), about)
        print(f"{run.name}: done", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
