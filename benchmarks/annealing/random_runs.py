"""One run of the random design: a plain loop, whose means are of every iterate, and its branches.

Means are differences of a running sum in float64, so that any span can be read without keeping its snapshots. This
module knows the loop; what is drawn is `design`'s business.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.annealing.decoder import Decoder
from benchmarks.annealing.design import (
    BLOCK_LENGTH,
    LEAST_ANNEAL,
    LONGEST_SHARE,
    MERGES,
    VALIDATION_BLOCKS,
    Branch,
    Draw,
)
from benchmarks.annealing.optimizers import make_optimizer
from pretrain_merge.demo.corpus import Corpus, TrainingBlocks, ValidationBlocks
from pretrain_merge.demo.models import constant_after_warmup
from pretrain_merge.lr_schedules import shape as lr_shape

_LONGEST_MEAN = 0.35  # of the steps so far
_LEAST_MEAN = 10  # steps


def train(run: Draw, corpus: Corpus, other: Corpus | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The run, its means and its branches; but for `seconds` it depends on the draw and the texts alone."""
    started = time.process_time()
    if run.epochs:
        num_bytes = run.num_steps * run.batch_size * BLOCK_LENGTH // run.epochs
        corpus = Corpus(corpus.train[:num_bytes], corpus.validation, corpus.num_files)
    validation = validation_blocks([corpus, other] if other else [corpus])
    trained = _Training(run, corpus)
    spans = spans_by_step(run)
    means = _Means(spans, trained.model)
    starts = {branch.start for branch in run.branches}
    states: dict[int, Mapping[str, Any]] = {}
    points = []
    factor = constant_after_warmup(run.warmup_steps)
    for step in range(1, run.num_steps + 1):
        trained.step(step, factor(step - 1), order=0)
        means.add(step)
        if step in spans:
            raw = evaluate(trained.model, validation)
            merged = {span: evaluate(means.model(step, span), validation) for span in spans[step]}
            points.append([step, run.peak_lr, raw, merged])
        if step in starts:
            states[step] = trained.state()
    seconds = {"run": time.process_time() - started}
    say(f"{run.name}: run {seconds['run']:.0f} s, {points[-1][2]:.4f}")
    anneals = []
    for branch in run.branches:
        trained.restore(states[branch.start])
        curve = lr_shape(branch.shape)
        for done in range(branch.steps):
            trained.step(branch.start + done + 1, curve(done / branch.steps), order=branch.order)
        anneals.append({**vars(branch), "loss": evaluate(trained.model, validation)})
    seconds["anneals"] = time.process_time() - started - seconds["run"]
    parameters = sum(value.numel() for value in trained.model.parameters())
    return {"parameters": parameters, "points": points, "anneals": anneals, "seconds": seconds}


def spans_by_step(run: Draw) -> dict[int, list[int]]:
    """At which steps the run is evaluated, with means over which spans.

    Everywhere over a ladder of halved spans; where a branch starts or ends also over its length and half of it.
    """
    own = {branch: (branch.start, branch.start + branch.steps) for branch in run.branches}
    grid = {place * run.num_steps // MERGES for place in range(1, MERGES + 1)}
    spans: dict[int, list[int]] = {}
    for step in sorted(grid | {place for both in own.values() for place in both}):
        wanted = _ladder(run) if step in grid else []
        for branch in (branch for branch, places in own.items() if step in places):
            wanted += _nested(branch)
        possible = {span for span in wanted if span <= min(_LONGEST_MEAN * step, step - run.warmup_steps)}
        spans[step] = sorted(possible)
    return spans


def _ladder(run: Draw) -> list[int]:
    span = LONGEST_SHARE * run.num_steps
    found = []
    while span >= LEAST_ANNEAL:
        found.append(round(span))
        span /= 2
    return found


def _nested(branch: Branch) -> list[int]:
    return [branch.steps // share for share in (1, 2) if branch.steps // share >= _LEAST_MEAN]


class _Training:
    """A model, its optimizer, and the batch of every step as a function of the step and the order."""

    def __init__(self, run: Draw, corpus: Corpus) -> None:
        torch.manual_seed(run.seed)
        self.model = Decoder(
            width=run.width, depth=run.depth, block_length=BLOCK_LENGTH, family=run.family, dropout=run.dropout
        )
        self._run = run
        self._optimizer = make_optimizer(run, self.model)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        num_blocks = run.num_steps * run.batch_size
        self._blocks = [
            TrainingBlocks(corpus.train, block_length=BLOCK_LENGTH, num_blocks=num_blocks, seed=1000 * order + run.seed)
            for order in (0, 1)
        ]

    def step(self, step: int, factor: float, *, order: int) -> None:
        """The step that makes so many steps done, at a share of the peak rate."""
        torch.manual_seed(1_000_000 * order + step)  # dropout, alike in the run and in a branch of the same order
        first = (step - 1) * self._run.batch_size
        blocks = [self._blocks[order][first + index]["input_ids"] for index in range(self._run.batch_size)]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.model.train()
        self._optimizer.zero_grad()
        self.model(torch.stack(blocks)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def state(self) -> Mapping[str, Any]:
        """All that a branch starts from."""
        return copied({"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        state = copied(state)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


class _Means:
    """Sums of all iterates up to the steps where a mean begins or ends; those that no later mean needs are dropped."""

    def __init__(self, spans: Mapping[int, Iterable[int]], model: Decoder) -> None:
        self._needed = sorted({step - span for step, several in spans.items() for span in [0, *several]})
        self._last = {}  # of each sum: the step of the last mean that it begins
        for step, several in spans.items():
            for span in several:
                self._last[step - span] = max(step, self._last.get(step - span, 0))
        self._parameters = list(model.parameters())
        self._sum = torch.zeros(sum(value.numel() for value in self._parameters), dtype=torch.float64)
        self._sums: dict[int, Tensor] = {}
        self._now = torch.zeros_like(self._sum)
        self._model = model

    def add(self, step: int) -> None:
        """The iterate of a step."""
        self._sum += torch.cat([value.detach().flatten() for value in self._parameters])
        place = bisect_left(self._needed, step)
        if place < len(self._needed) and self._needed[place] == step:
            self._now = self._sum.clone()
            sums = {**self._sums, step: self._now}
            self._sums = {start: kept for start, kept in sums.items() if self._last.get(start, 0) >= step}

    def model(self, step: int, span: int) -> "_Swapped":
        """The model with the mean of the iterates of the last `span` steps in its weights, for one evaluation."""
        return _Swapped(self._model, (self._now - self._sums[step - span]) / span)


class _Swapped:
    def __init__(self, model: Decoder, mean: Tensor) -> None:
        self._model, self._mean = model, mean

    def __enter__(self) -> Decoder:
        self._kept = copied(self._model.state_dict())
        torch.nn.utils.vector_to_parameters(self._mean.float(), self._model.parameters())
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model.load_state_dict(self._kept)


def evaluate(model: "Decoder | _Swapped", validation: Tensor) -> float:
    """Mean loss on held-out blocks, in nats per byte."""
    if isinstance(model, _Swapped):
        with model as swapped:
            return evaluate(swapped, validation)
    model.eval()
    with torch.no_grad():
        parts = [(model(part) * len(part)).item() for part in validation.split(80)]
    return sum(parts) / len(validation)


def validation_blocks(texts: Iterable[Corpus]) -> Tensor:
    """Held-out blocks of some texts in equal parts, `(blocks, length)`."""
    chosen = list(texts)
    number = VALIDATION_BLOCKS // len(chosen)
    blocks = [ValidationBlocks(text.validation, block_length=BLOCK_LENGTH, num_blocks=number) for text in chosen]
    return torch.stack([part[index]["input_ids"] for part in blocks for index in range(number)])


def copied(value: Any) -> Any:
    """The same nested values with tensors of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value
