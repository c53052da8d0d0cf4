"""Short runs whose data depend on the step only, so that a resumed one can be compared with the whole one (P26)."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, rows
from harness.models import trainer as plain_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from pretrain_merge import ModelMerging

MARKS = [
    *LIGHTNING_REMARKS,
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]
STEPS = 16
OPTIONS = {"window": 3, "every": 2, "merge_every": 4, "views": ["sma", "wma"], "tokens_per_batch": 5}


class ByStep(pl.LightningModule):
    """Learns from data that depend on the step only, so that a resumed run sees what the whole one saw (P26)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(3, 1).to(torch.bfloat16)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.trainer.global_step))
        return (self.head(self.layer(x).tanh().bfloat16()).float() - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(torch.ones(2, 4)).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Events(pl.Callback):
    """What happens in a run besides steps: a phase begins."""

    def __init__(self, merging: ModelMerging) -> None:
        self.merging = merging

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            self.merging.mark_phase("second")


def trainer(folder: Path, merging: ModelMerging, *callbacks: Any, **options: Any) -> pl.Trainer:
    return plain_trainer(folder, *callbacks, merging, **({"max_steps": STEPS, "enable_checkpointing": True} | options))


def saving(folder: Path, **options: Any) -> ModelCheckpoint:
    defaults = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    return ModelCheckpoint(folder / "kept", **(defaults | options))


def fit(folder: Path, *, module: Any = None, ckpt_path: Path | None = None, **options: Any) -> Any:
    own = {key: options.pop(key) for key in list(options) if key in ("max_steps", "logger", "accumulate_grad_batches")}
    kept = options.pop("saving", None) or saving(folder)
    merging = ModelMerging(**(OPTIONS | options))
    module = module or ByStep()
    trainer(folder, merging, Events(merging), kept, **own).fit(module, rows(64), rows(4), ckpt_path=ckpt_path)
    return module, merging


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "merges.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in read]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "window").iterdir())


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "kept" / f"step={step}.ckpt"


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
