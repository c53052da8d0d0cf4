"""The suite by random design: each factor of a run is drawn on its own, so that no two go together as in a chosen list.

Draws come from a Sobol sequence (Sobol 1967; scrambled after Owen 1998): any first 8, 16 or 32 runs already cover every
factor evenly, so a suite that was interrupted is a smaller random design. Numbers and names only.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np
import torch

NUM_RUNS = 48
MERGES = 20  # evenly spaced in a run, besides those where a branch leaves it
ENDS = (5, 10, 20)  # of these: branches end after a quarter, a half and all of the run
PER_END = 6
LEAST_ANNEAL, LONGEST_SHARE = 20, 0.3  # steps; of the end
VALIDATION_BLOCKS = 160
BLOCK_LENGTH = 64
_BLOCK = 8  # runs that are trained cheapest first
_SEED = 1906
_MOST_SECONDS = (60.0, 600.0)  # of one run on one core, by the estimate below; log-uniform: long runs are seldom large
_STEP_SECONDS, _FLOPS = 6e-3, 2e10  # measured on one core: of a step that computes nothing, and in a second
_EVALUATIONS = 180  # of a run, as far as an estimate goes
_WIDTHS, _DEPTHS, _BATCHES = (48, 64, 96, 128, 192, 256), (2, 3, 4, 5, 6), (4, 64)
_TEXTS = ("stdlib", "headers", "manuals", "perl", "scripts", "markov", "sums")
# a good learning rate at width 64; at others it falls with the root of the width
_GOOD_LR = {"adamw": 3e-3, "muon": 1.2e-2, "sgd": 0.15, "adafactor": 1.2e-2}
_LR_FACTORS = (1 / 4, 2.5)
_SHAPES = ("linear", "linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class Branch:
    """An anneal that leaves the run at `start` and ends after `steps`; `order` 0 sees the run's own batches."""

    start: int
    steps: int
    shape: str
    order: int = 0


@dataclass(frozen=True)
class Draw:
    """One run.

    Attributes:
        name: Name of its file.
        seed: Draws weights, data and branches.
        num_steps: Length; log-uniform.
        warmup_steps: Log-uniform, a fifth of the run at most.
        family: "dense" or "moe".
        width: Size of the hidden states.
        depth: Number of layers.
        batch_size: Blocks of 64 bytes per step; log-uniform.
        optimizer: A key of `_GOOD_LR`.
        peak_lr: Log-uniform around a good one.
        weight_decay: 0 or 0.1.
        text: A name in `texts.TEXTS`.
        shifted_to: Text that half of the validation blocks come from; empty: all are of the same text.
        epochs: How often the run passes its text; 0: the text is longer than the run.
        dropout: After the embedding and on attention weights.
    """

    name: str
    seed: int
    num_steps: int
    warmup_steps: int
    family: str
    width: int
    depth: int
    batch_size: int
    optimizer: str
    peak_lr: float
    weight_decay: float
    text: str
    shifted_to: str
    epochs: int
    dropout: float

    @property
    def parameters(self) -> int:
        """About how many."""
        return 12 * self.depth * self.width**2 * (2 if self.family == "moe" else 1) + 320 * self.width

    @property
    def seconds(self) -> float:
        """About how long it and its branches take on one core."""
        steps = self.num_steps + sum(branch.steps for branch in self.branches)
        blocks = 3 * steps * self.batch_size + _EVALUATIONS * VALIDATION_BLOCKS  # backward costs twice
        return _STEP_SECONDS * steps + 2 * self.parameters * blocks * BLOCK_LENGTH / _FLOPS

    @property
    def branches(self) -> list[Branch]:
        """For each end one from each sixth of the lengths, in log steps; the last one in a second data order, too."""
        random = np.random.default_rng((_SEED, self.seed))
        found = []
        for end in (place * self.num_steps // MERGES for place in ENDS):
            longest = min(LONGEST_SHARE * end, float(end - self.warmup_steps - LEAST_ANNEAL))
            places = (np.arange(PER_END) + random.random(PER_END)) / PER_END
            lengths = LEAST_ANNEAL * (longest / LEAST_ANNEAL) ** places
            for length in dict.fromkeys(lengths.astype(int).tolist()):
                found.append(Branch(end - length, length, str(random.choice(_SHAPES))))
        return [*found, replace(found[-1], order=1)]

    def describe(self) -> dict[str, object]:
        """All numbers, for the record."""
        return asdict(self)


def draws(num_runs: int = NUM_RUNS) -> list[Draw]:
    """The first runs of the design, in blocks of eight that each cover all factors, cheapest first within a block."""
    points = torch.quasirandom.SobolEngine(11, scramble=True, seed=_SEED).draw(num_runs).tolist()
    runs = [_draw(index, point) for index, point in enumerate(points)]
    blocks = [runs[first : first + _BLOCK] for first in range(0, num_runs, _BLOCK)]
    return [run for block in blocks for run in sorted(block, key=lambda run: run.seconds)]


def _draw(index: int, point: Sequence[float]) -> Draw:
    length, warmup, lr, optimizer, decay, text, family, shift, epochs, dropout, cost = point
    num_steps = round(_log_uniform(length, 400, 10_000) / MERGES) * MERGES
    name, other = _one_of(_TEXTS, text), _one_of(_TEXTS[:5], (text * len(_TEXTS)) % 1)
    random = np.random.default_rng((_SEED, 1000 + index))
    chosen = _one_of(tuple(_GOOD_LR), optimizer)
    run = Draw(
        name=f"random-{index:02d}",
        seed=index,
        num_steps=num_steps,
        warmup_steps=round(_log_uniform(warmup, 20, min(300.0, num_steps / 10))),
        family="moe" if family < 1 / 3 else "dense",
        width=min(_WIDTHS),
        depth=min(_DEPTHS),
        batch_size=min(_BATCHES),
        optimizer=chosen,
        peak_lr=0.0,
        weight_decay=0.1 if decay < 1 / 2 and chosen != "sgd" else 0.0,  # coupled, 0.1 would drown the gradient
        text=name,
        shifted_to=other if shift < 1 / 5 and other != name else "",
        epochs=3 if epochs < 1 / 5 else 0,
        dropout=0.1 if dropout < 1 / 5 else 0.0,
    )
    most_seconds = _log_uniform(cost, *_MOST_SECONDS)
    sizes = [replace(run, width=width, depth=depth) for width, depth in product(_WIDTHS, _DEPTHS)]
    affordable = [item for item in sizes if item.seconds <= most_seconds] or [run]
    run = affordable[int(random.integers(len(affordable)))]
    batches = range(_BATCHES[0], _BATCHES[1] + 1)
    most = max((size for size in batches if replace(run, batch_size=size).seconds <= most_seconds), default=4)
    lr = _GOOD_LR[chosen] * (64 / run.width) ** 0.5 * _log_uniform(lr, *_LR_FACTORS)
    return replace(run, batch_size=round(_log_uniform(random.random(), 4, most)), peak_lr=float(f"{lr:.3g}"))


def _log_uniform(place: float, low: float, high: float) -> float:
    return float(low * (high / low) ** place)


def _one_of(values: Sequence[str], place: float) -> str:
    return values[int(place * len(values))]
