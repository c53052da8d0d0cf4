"""One run: trained once, with every model that a merge needs kept in memory; then every merge is measured.

This module knows Lightning and tensors. Which merges there are is `merges`' business.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.ablations.merges import Merge, Plan
from benchmarks.ablations.routing import routing_at
from benchmarks.ablations.setups import DECAY, Run
from benchmarks.annealing.training import SuiteModel
from pretrain_merge.demo.corpus import Corpus, ValidationBlocks
from pretrain_merge.demo.fitting import CheckpointAt, fit, quiet
from pretrain_merge.demo.models import constant_after_warmup, linear_anneal
from pretrain_merge.kernels.weighted_sum import weighted_sum_

_QUIET = {"logger": False, "enable_progress_bar": False}


class Trajectory(Callback):
    """Keeps the model of chosen steps, each as one vector."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.models: dict[int, Tensor] = {}
        self._steps = frozenset(steps)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        if trainer.global_step in self._steps:
            self.models[trainer.global_step] = parameters_to_vector(pl_module.parameters()).detach()


class Scale:
    """Measures models on two halves of the held-out text: a rule chooses on one and is judged on the other.

    Args:
        module: Takes the weights; what it holds is overwritten.
        corpus: The text.
        run: Says how many blocks.
    """

    def __init__(self, module: SuiteModel, corpus: Corpus, run: Run) -> None:
        self.model = module.model.eval()
        blocks = ValidationBlocks(
            corpus.validation, block_length=run.block_length, num_blocks=run.num_validation_blocks
        )
        ids = torch.stack([blocks[index]["input_ids"] for index in range(len(blocks))])
        self.halves = (ids[0::2], ids[1::2])  # of every file a part on each side

    def put(self, models: Mapping[int, Tensor], merge: Merge) -> None:
        """Write a merge into the model."""
        merged = torch.empty_like(models[merge.steps[-1]])
        weighted_sum_([merged], [[models[step]] for step in merge.steps], merge.weights)
        vector_to_parameters(merged, self.model.parameters())

    @torch.no_grad()
    def losses(self, models: Mapping[int, Tensor], merge: Merge) -> list[float]:
        """Mean cross entropy of a merge on each half, in nats per byte."""
        self.put(models, merge)
        return [float(self.model(input_ids=ids, labels=ids).loss) for ids in self.halves]


def train(run: Run, corpus: Corpus, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and measure; but for `seconds` the result depends on the run and the text alone."""
    started = time.process_time()
    with quiet(), tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "branch.ckpt"
        models = _fit(run, corpus, checkpoint)
        branch = _decay(run, corpus, checkpoint) if run.decays else {}
    seconds = {"train": time.process_time() - started}
    say(f"{run.name}: trained, {seconds['train']:.0f} s of CPU, {len(models)} models kept")
    module = SuiteModel(run, constant_after_warmup(1))
    scale, plan = Scale(module, corpus, run), Plan(run.unit)
    result = {
        "parameters": sum(value.numel() for value in module.parameters()),
        "constant": {step: _measure(scale, models, merges) for step, merges in plan.constant().items()},
        "decay": {step: _measure(scale, branch, merges) for step, merges in plan.decay().items() if branch},
        "routing": {
            step: routing_at(scale, models, merges) for step, merges in plan.constant().items() if run.family == "moe"
        },
    }
    seconds["measure"] = time.process_time() - started - seconds["train"]
    return result | {"seconds": seconds}


def _measure(scale: Scale, models: Mapping[int, Tensor], merges: Sequence[Merge]) -> list[list[Any]]:
    losses: dict[tuple[object, ...], list[float]] = {}  # two views are one merge where the warm-up cuts both off
    rows = []
    for merge in merges:
        span, recipe = merge.steps[-1] - merge.steps[0], (merge.steps, merge.weights)
        if recipe not in losses:
            losses[recipe] = scale.losses(models, merge)
        rows.append([merge.kind, merge.every, merge.asked, merge.used, span, *losses[recipe]])
    return rows


def _fit(run: Run, corpus: Corpus, checkpoint: Path) -> dict[int, Tensor]:
    trajectory = Trajectory(Plan(run.unit).stored_steps())
    module = SuiteModel(run, constant_after_warmup(run.warmup_steps))
    callbacks = [trajectory, CheckpointAt(DECAY * run.unit, checkpoint)]
    fit(run, corpus, module, callbacks=callbacks, default_root_dir=checkpoint.parent, limit_val_batches=0, **_QUIET)
    return trajectory.models


def _decay(run: Run, corpus: Corpus, checkpoint: Path) -> dict[int, Tensor]:
    """The run's last stretch on the run's own batches, with a falling rate."""
    start, merges = DECAY * run.unit, Plan(run.unit).decay().values()
    trajectory = Trajectory(step for group in merges for merge in group for step in merge.steps)
    fit(
        run,
        corpus,
        SuiteModel(run, linear_anneal(start, run.num_steps - start)),
        first_step=start,
        ckpt_path=checkpoint,
        callbacks=[trajectory],
        default_root_dir=checkpoint.parent,
        limit_val_batches=0,
        **_QUIET,
    )
    return trajectory.models
