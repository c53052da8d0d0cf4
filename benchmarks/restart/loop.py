"""A plain training loop that can go on from any state, with any optimizer state, rate and batches.

This module knows the loop and merges of states. Which restarts are compared is the business of `questions`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.annealing.decoder import VOCAB_SIZE, Decoder
from benchmarks.annealing.random_runs import copied, evaluate
from benchmarks.collapse import Collapse
from benchmarks.restart.setups import BLOCK_LENGTH, TAIL, Setup
from pretrain_merge.demo.corpus import Corpus, TrainingBlocks

OptimizerState = Literal["fresh", "newest", "average"]
Batches = Callable[[int], Tensor]


@dataclass(frozen=True)
class State:
    """All that training goes on from.

    Attributes:
        step: Steps done.
        model: State dict.
        optimizer: State dict; None is a fresh one.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None


@dataclass
class Followed:
    """What became of a restart.

    Attributes:
        losses: On held-out text, by steps since the restart.
        other_losses: The same on a second text.
        norms: Norm of the gradient before clipping, by step.
        tail: Held-out loss of the mean of the last iterates; NaN where it did not come so far.
        died: Steps after which the training loss had collapsed; None where it never did.
    """

    losses: dict[int, float] = field(default_factory=dict)
    other_losses: dict[int, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    tail: float = math.nan
    died: int | None = None


def batches(corpus: Corpus, setup: Setup, *, order: int = 0) -> Batches:
    """The batch of each step, a function of the step, the seed and the order alone."""
    size = setup.batch_size
    blocks = TrainingBlocks(
        corpus.train, block_length=BLOCK_LENGTH, num_blocks=1_000_000 * size, seed=1000 * order + setup.seed
    )
    return lambda step: torch.stack([blocks[(step - 1) * size + index]["input_ids"] for index in range(size)])


def random_bytes(setup: Setup) -> Batches:
    """Batches that have nothing to say."""

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * setup.seed + step)
        return torch.randint(VOCAB_SIZE, (setup.batch_size, BLOCK_LENGTH), generator=generator)

    return batch


class Training:
    """A model and its optimizer."""

    def __init__(self, setup: Setup) -> None:
        torch.manual_seed(setup.seed)
        self.model = Decoder(
            width=setup.width, depth=setup.depth, block_length=BLOCK_LENGTH, family="dense", dropout=0.0
        )
        self._setup = setup
        self._optimizer = self._new_optimizer()

    def step(self, batch: Tensor, *, lr: float, clip: float) -> tuple[float, float]:
        """One step; the training loss and the norm of its gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self._optimizer.zero_grad()
        loss = self.model(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)  # infinite: measured, not clipped
        self._optimizer.step()
        return loss.item(), norm.item()

    def state(self, step: int) -> State:
        """A copy of all that a restart needs."""
        return State(step, copied(self.model.state_dict()), copied(self._optimizer.state_dict()))

    def restore(self, state: State) -> None:
        """Go back to a state."""
        self.model.load_state_dict(state.model)
        self._optimizer = self._new_optimizer()
        if state.optimizer is not None:
            self._optimizer.load_state_dict(copied(state.optimizer))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        betas = (0.9, self._setup.beta2)
        return torch.optim.AdamW(self.model.parameters(), lr=1.0, betas=betas, weight_decay=0.1, fused=True)


def merged(states: Sequence[State], optimizer: OptimizerState) -> State:
    """The plain mean of the weights, with one of three optimizer states; counters are the newest's."""
    newest = states[-1]
    model = {name: _mean([state.model[name] for state in states]) for name in newest.model}
    return State(newest.step, model, _optimizer_state(states, optimizer))


def with_fresh_optimizer(state: State) -> State:
    """The same weights."""
    return State(state.step, state.model, None)


def follow(
    training: Training,
    start: State,
    rate: Callable[[int], float],
    text: Batches,
    *,
    first: int,
    num_steps: int,
    validation: Tensor,
    measured: Iterable[int],
    clip: float,
    other_validation: Tensor | None = None,
    collapse: Collapse | None = None,
) -> Followed:
    """Train on from a state.

    Args:
        training: Whose model and optimizer are used.
        start: Weights and optimizer state.
        rate: Learning rate by steps since the restart, from 0.
        text: Batches by step.
        first: The step whose batch comes first.
        num_steps: How far, unless it collapses.
        validation: Held-out blocks.
        measured: Steps since the restart at which they are evaluated.
        clip: Largest norm of the gradient.
        other_validation: Held-out blocks of a second text.
        collapse: Ends it; None goes on whatever happens.
    """
    training.restore(start)
    found, places = Followed(), set(measured)
    sums = [torch.zeros_like(value, dtype=torch.float64) for value in training.model.parameters()]
    for done in range(num_steps + 1):
        if done in places:
            found.losses[done] = evaluate(training.model, validation)
            if other_validation is not None:
                found.other_losses[done] = evaluate(training.model, other_validation)
        if done == num_steps:
            break
        loss, norm = training.step(text(first + done), lr=rate(done), clip=clip)
        found.norms.append(norm)
        if collapse is not None and collapse.sees(done + 1, loss):
            found.died = done + 1
            return found
        if done >= num_steps - TAIL:
            for total, value in zip(sums, training.model.parameters(), strict=True):
                total += value.detach()
    with torch.no_grad():
        for total, value in zip(sums, training.model.parameters(), strict=True):
            value.copy_(total / min(TAIL, num_steps))
    found.tail = evaluate(training.model, validation)
    return found


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).double().mean(dim=0).to(values[0].dtype)


def _optimizer_state(states: Sequence[State], kind: OptimizerState) -> Mapping[str, Any] | None:
    newest = states[-1].optimizer
    if kind != "average" or newest is None:
        return newest if kind == "newest" else None
    found = copied(newest)
    for key, values in found["state"].items():
        for name in values.keys() - {"step"}:
            values[name] = _mean([state.optimizer["state"][key][name] for state in states if state.optimizer])
    return found
