"""What is trained and where it is measured. Numbers and names only.

The scale is the paper's (PMA, arXiv 2505.12082, Figures 4 and 5). Its unit, 32 billion tokens, is a fiftieth of a run
here: the paper's stages of 204, 607, 1004 and 1607 billion tokens, and its intervals of 4 to 32 billion, are the same
shares of the training.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.annealing.setups import Setup

UNITS = 50  # of a run; the warm-up takes the first, and no snapshot is older
STAGES = {6: "204B", 19: "607B", 31: "1004B", 50: "1607B"}  # units, and the paper's tokens
BETWEEN = (12, 25, 40)  # where spans are compared, too
INTERVALS = {8: "4B", 4: "8B", 2: "16B", 1: "32B"}  # parts of a unit, and the paper's tokens
NUMBERS = (3, 6, 10, 15)
DECAY = 40  # from here on, the rate falls linearly to zero in a branch
IN_DECAY = (43, 46, 49, 50)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run(Setup):
    """One training run.

    Attributes:
        cell: What differs from the base, the seeds aside.
        decays: Whether its last fifth is trained once more under a falling rate.
    """

    cell: str = ""
    decays: bool = False

    @property
    def unit(self) -> int:
        """Steps that stand for 32 billion tokens of the paper."""
        return self.num_steps // UNITS


_CELLS: dict[str, dict[str, Any]] = {
    "dense": {"decays": True},
    "moe": {"family": "moe", "decays": True},
    "dense-lr-low": {"peak_lr": 1e-3},
    "dense-lr-high": {"peak_lr": 9e-3},
    "dense-wide": {"width": 96},
    "dense-batch-small": {"batch_size": 2},
    "moe-lr-high": {"family": "moe", "peak_lr": 9e-3},
    "moe-wide": {"family": "moe", "width": 96},
    "dense-muon": {"optimizer": "muon", "peak_lr": 1e-2},
    "dense-sgd": {"optimizer": "sgd", "peak_lr": 0.1, "weight_decay": 0.0},
    "dense-long": {"num_steps": 2400},
}


def _runs() -> tuple[Run, ...]:
    base: dict[str, Any] = {"num_steps": 1200, "num_validation_blocks": 128}
    runs = []
    # cell by cell, the cheap ones first: what was interrupted has every seed of what it has
    for cell, changes in _CELLS.items():
        setup = base | changes
        warmup = setup["num_steps"] // UNITS
        runs += [Run(name=f"{cell}-{seed}", cell=cell, seed=seed, warmup_steps=warmup, **setup) for seed in SEEDS]
    return tuple(runs)


RUNS = _runs()
CELLS = tuple(_CELLS)
