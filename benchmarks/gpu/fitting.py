"""One fit under Lightning, with all that two fits are compared by. Knows Lightning; knows no merging."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.workload import Batches


@dataclass(frozen=True)
class Fit:
    """What a fit left.

    Attributes:
        losses: Of every step.
        validation: Loss of each of the Trainer's own validations.
        weights: At the end.
        seconds: Of each step, from one batch's end to the next, as the host sees it.
        graphs: Graphs that `torch.compile` made meanwhile.
        peak_bytes: Most memory of the device that tensors took at once.
    """

    losses: Tensor
    validation: list[float]
    weights: list[Tensor]
    seconds: list[float]
    graphs: int
    peak_bytes: int

    def equals(self, other: "Fit") -> bool:
        """Whether every loss and every weight is the same, bit for bit; of the shorter fit, its losses alone."""
        number = min(len(self.losses), len(other.losses))
        is_same = torch.equal(self.losses[:number], other.losses[:number])
        if len(self.losses) != len(other.losses):
            return is_same
        pairs = zip(self.weights, other.weights, strict=True)
        return is_same and self.validation == other.validation and all(torch.equal(*pair) for pair in pairs)


class LanguageModule(pl.LightningModule):
    """Trains a causal language model as they are pre-trained: AdamW at a constant rate."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        self.losses.append(loss.detach().float())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


@dataclass
class _Watch(pl.Callback):
    """When each step ended, and what the Trainer itself measured."""

    ends: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validation.append(float(trainer.callback_metrics["val_loss"]))


def fit(
    setting: Setting,
    module: LanguageModule,
    *,
    num_steps: int,
    callbacks: Sequence[pl.Callback] = (),
    validate_every: int | None = None,
    **trainer_options: Any,
) -> Fit:
    """Train a module, which keeps what it learns, on batches that depend on their number alone."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "pretrain_merge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    graphs_before = _num_graphs()
    if not setting.rehearses:
        torch.cuda.reset_peak_memory_stats()
    watch = _Watch()
    trainer = pl.Trainer(
        accelerator=setting.accelerator,
        devices=1,
        max_steps=num_steps,
        callbacks=[*callbacks, watch],
        default_root_dir=setting.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=1.0 if validate_every else 0,
        **trainer_options,
    )
    validation = DataLoader(Batches(setting, 2, first=10**6), batch_size=None)
    trainer.fit(module, DataLoader(Batches(setting, num_steps), batch_size=None), validation)
    setting.wait()
    return Fit(
        losses=torch.stack(module.losses).cpu(),
        validation=watch.validation,
        weights=[_shard(parameter).detach().cpu().clone() for parameter in module.parameters()],
        seconds=[after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)],
        graphs=_num_graphs() - graphs_before,
        peak_bytes=0 if setting.rehearses else torch.cuda.max_memory_allocated(),
    )


def _shard(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
