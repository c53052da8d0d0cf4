"""What tests of the callback look at: its records, and the weights that an evaluator or a step saw."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from harness.models import weights
from torch import Tensor, nn

from pretrain_merge.records import read_records


def records(folder: Path) -> list[Any]:
    path = folder / "merges.jsonl"
    return read_records(path) if path.exists() else []


class Seen:
    """An evaluator that keeps the weights it was shown."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def __call__(self, module: nn.Module) -> dict[str, float]:
        self.weights.append({name: value.detach().clone() for name, value in module.named_parameters()})
        return {"number": float(len(self.weights))}


class RawAfterStep(pl.Callback):
    """Put before the merging callback: raw weights as training left them."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        trainer.raw = weights(pl_module)
