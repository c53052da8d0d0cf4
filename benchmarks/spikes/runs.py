"""Runs that go well and runs that collapse, as the training loss and gradient norm of each step.

This module knows the loop and what makes a run collapse. What a detector sees in them is `scores`' business.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.annealing.decoder import Decoder
from benchmarks.annealing.optimizers import make_optimizer
from benchmarks.collapse import Collapse
from pretrain_merge.demo.corpus import Corpus, TrainingBlocks

BLOCK_LENGTH = 64
_LOOKS_EVERY = 50
# By which a run has collapsed: nats of the smoothed loss above its lowest, and those up to which it is as good as ever.
# The first was there before any result; half a nat of a loss as noisy as these comes and goes.
DEFINITIONS = {".5 nat": (0.5, 0.15), "1 nat": (1.0, 0.3)}


@dataclass(frozen=True)
class Run:
    """One run at constant rate after a warm-up.

    Attributes:
        kind: What it is an example of.
        seed: Draws weights and data.
        text: A name in `texts.TEXTS`.
        optimizer: A name that `make_optimizer` knows.
        peak_lr: Learning rate after the warm-up.
        beta2: Of AdamW.
        clip: Largest norm of the gradient.
        width: Size of the hidden states.
        depth: Layers.
        family: "dense" or "moe".
        batch_size: Blocks of 64 bytes per step.
        num_steps: At most; a run that has collapsed ends soon after.
        weight_decay: Decoupled but for SGD.
    """

    kind: str
    seed: int
    text: str = "stdlib"
    optimizer: str = "adamw"
    peak_lr: float = 3.5e-3
    beta2: float = 0.95
    clip: float = 1.0
    width: int = 48
    depth: int = 2
    family: str = "dense"
    batch_size: int = 4
    num_steps: int = 1500
    weight_decay: float = 0.1

    @property
    def name(self) -> str:
        """Of its arrays in the record."""
        return f"{self.kind}-{self.seed}"


STABLE = (
    Run("base", 0),
    Run("lr-high", 0, peak_lr=1e-2),
    Run("lr-low", 0, peak_lr=5e-4),
    Run("batch-1", 0, batch_size=1, num_steps=3000),
    Run("batch-16", 0, batch_size=16, num_steps=1000),
    Run("muon", 0, optimizer="muon", peak_lr=1e-2),
    Run("sgd", 0, optimizer="sgd", peak_lr=0.1, weight_decay=0.0),
    Run("moe", 0, family="moe"),
    Run("headers", 0, text="headers"),
    Run("markov", 0, text="markov"),
    Run("beta2", 0, beta2=0.999),
    Run("wide", 0, width=96, num_steps=800),
)
COLLAPSING = (
    Run("divergence", 0, peak_lr=0.3, beta2=0.999, clip=math.inf),
    Run("divergence-wide", 0, peak_lr=0.1, beta2=0.999, clip=math.inf, width=96, num_steps=800),
    Run("creeping-headers", 0, peak_lr=0.3, clip=math.inf, text="headers", batch_size=8),
    Run("creeping", 0, peak_lr=0.3, clip=math.inf),
)


def seeded(runs: tuple[Run, ...], seeds: int) -> list[Run]:
    """Each of them with so many seeds."""
    return [replace(run, seed=seed) for seed in range(seeds) for run in runs]


def trained(run: Run, corpus: Corpus, *, until_collapse: bool) -> NDArray[np.float32]:
    """`(2, step)`: training loss and norm of the gradient before clipping.

    Args:
        run: What is trained.
        corpus: Its text.
        until_collapse: Go on for 100 steps beyond a collapse, and no further.
    """
    return recorded(_steps(run, corpus), until_collapse=until_collapse)


def recorded(steps: Iterable[tuple[float, float]], *, until_collapse: bool) -> NDArray[np.float32]:
    """`(2, step)`: what the steps of a run gave, as `trained`."""
    found: list[tuple[float, float]] = []
    told, onset = _told(*DEFINITIONS["1 nat"]), None
    for step, (loss, norm) in enumerate(steps, start=1):
        found.append((loss, norm))
        if onset is None and told.sees(step, loss):
            onset = told.sound_until
        looks = until_collapse and step % _LOOKS_EVERY == 0
        if looks and onset is not None and step >= onset + 100:
            break
    return np.array(found, dtype=np.float32).T


def collapse(losses: list[float], definition: str) -> int | None:
    """The last step at which the smoothed loss was as good as ever, counted from 1; None: it never collapsed.

    With hindsight and by nats, where the detector has neither.
    """
    told = _told(*DEFINITIONS[definition])
    return next((told.sound_until for step, loss in enumerate(losses, start=1) if told.sees(step, loss)), None)


def _told(collapsed: float, sound: float) -> Collapse:
    return Collapse(collapsed=collapsed, sound=sound)


def _steps(run: Run, corpus: Corpus) -> Iterator[tuple[float, float]]:
    torch.manual_seed(run.seed)
    model = Decoder(width=run.width, depth=run.depth, block_length=BLOCK_LENGTH, family=run.family, dropout=0.0)
    optimizer = make_optimizer(run, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (group["betas"][0], run.beta2)
    size = run.batch_size
    blocks = TrainingBlocks(corpus.train, block_length=BLOCK_LENGTH, num_blocks=run.num_steps * size, seed=run.seed)
    for step in range(run.num_steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 30)
        optimizer.zero_grad()
        loss = model(torch.stack([blocks[step * size + index]["input_ids"] for index in range(size)]))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        yield loss.item(), norm.item()
