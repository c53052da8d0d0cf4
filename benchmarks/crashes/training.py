"""The run that is broken: a small model whose data depend on the step only. Executed in child processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from pretrain_merge import ModelMerging, SpikeRecovery

# Steps whose batches make a run diverge that shall be taken back: it is at 90, and at 100 the data are told to blame.
_BAD = range(84, 96)
STEPS = 30  # with a snapshot, a merge and a checkpoint at the last one, which a run that resumes there may still owe


@dataclass(frozen=True)
class Setting:
    """What is varied between runs."""

    store: str
    average: str
    accumulate: int = 1
    strategy: str = "auto"
    recovers: bool = False

    def __str__(self) -> str:
        words = [
            self.store,
            self.average,
            f"accumulate {self.accumulate}" if self.accumulate > 1 else "",
            self.strategy,
            "recovers" if self.recovers else "",
        ]
        return ", ".join(word for word in words if word not in ("", "auto"))

    @property
    def steps(self) -> int:
        return 110 if self.recovers else STEPS

    @property
    def merge_every(self) -> int:
        # merges are most of what a run costs, and the way back from a divergence is longer than a run without one
        return 30 if self.recovers else 6

    @property
    def num_processes(self) -> int:
        return 1 if self.strategy == "auto" else 2


SETTINGS = {
    1: [
        Setting(store, average, 1 + index % 2)
        for index, (average, store) in enumerate(product(("last", "block"), ("device", "host", "disk")))
    ],
    2: [
        Setting("device", "last", strategy="ddp"),
        Setting("disk", "block", strategy="ddp"),
        Setting("host", "last", strategy="fsdp2"),
        Setting("device", "block", strategy="fsdp2"),
    ],
}

RECOVERING = {
    1: [Setting("host", "last", recovers=True), Setting("disk", "last", accumulate=2, recovers=True)],
    2: [
        Setting("device", "last", strategy="ddp", recovers=True),
        Setting("host", "last", strategy="fsdp2", recovers=True),
    ],
}

CHOSEN = {1: Setting("disk", "block"), 2: Setting("device", "last", strategy="ddp")}  # for kills at the same moments


class _Model(pl.LightningModule):
    def __init__(self, bad: Sequence[int] = ()) -> None:
        super().__init__()
        self._bad = bad
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.layers[0].weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.layers[0], mesh=mesh)
            fully_shard(self.layers, mesh=mesh)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        # by the batches that have gone through the loop, which a resumed run counts on: data of the step only (P26)
        micro_batch = index % self.trainer.accumulate_grad_batches
        seed = 1000 * self.trainer.global_step + 10 * micro_batch + self.trainer.global_rank
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        return self._loss(inputs, shift=1e3 if self.trainer.global_step in self._bad else 0.0)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def _loss(self, inputs: Tensor, shift: float = 0.0) -> Tensor:
        return (self.layers(inputs) - 2 * inputs[:, :4] - shift).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class _Group(ClusterEnvironment):
    """The process group that is there already."""

    creates_processes_externally = True
    main_address, main_port = "unused", 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    def local_rank(self) -> int:
        return self.global_rank()

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


class AtStep(pl.Callback):
    """Does something when a step begins."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._step, self._action = step, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            self._action()


def train(
    folder: Path,
    setting: Setting,
    checkpoint: Path | None,
    callbacks: Sequence[pl.Callback] = (),
    *,
    save_on_exception: bool = False,
) -> None:
    """Run to the end from the beginning or a checkpoint; the final weights are `final.pt`."""
    every, soon = setting.merge_every, 9 if setting.average == "last" else 12
    merging = ModelMerging(
        window=4, every=3, merge_every=every, views=["sma", "wma", "sma3"], average=setting.average,
        save={} if setting.strategy == "fsdp2" else {"every": 2 * every, "keep": 2, "at_end": True},
        store=setting.store, tokens_per_batch=7, forecast={"soon": {"steps": soon}},
    )  # fmt: skip
    recovering = SpikeRecovery(
        distrust=15, every=10, rewarm=10, confirm=5, store="disk" if setting.store == "disk" else "host",
        optimizer="newest" if setting.store == "disk" else "fresh",
    )  # fmt: skip
    saving = pl.callbacks.ModelCheckpoint(
        dirpath=folder / "checkpoints", every_n_train_steps=5, save_top_k=2, monitor="step", mode="max",
        filename="{step}", enable_version_counter=False, save_on_exception=save_on_exception,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=setting.steps, accelerator="cpu", logger=False, default_root_dir=folder,
        callbacks=[*callbacks, merging, *[recovering] * setting.recovers, saving],
        accumulate_grad_batches=setting.accumulate, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=2, val_check_interval=10**6,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, use_distributed_sampler=False, **_strategy(setting),
    )  # fmt: skip
    model = _Model(_BAD if setting.recovers else ())
    trainer.fit(
        model,
        DataLoader([torch.zeros(4, 8)] * 1000, batch_size=None),
        DataLoader([torch.eye(8)] * 3, batch_size=None),
        ckpt_path=checkpoint,
    )
    if trainer.global_step == setting.steps:
        whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in _state(model)}
        if trainer.global_rank == 0:
            # a kill in the midst of it must not look like a run that ended
            torch.save(whole, folder / "final.pt.part")
            (folder / "final.pt.part").replace(folder / "final.pt")


def _state(model: _Model) -> list[tuple[str, Tensor]]:
    return sorted(model.state_dict().items())


def _strategy(setting: Setting) -> dict[str, Any]:
    if setting.strategy == "ddp":
        return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "plugins": [_Group()]}
    if setting.strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )  # fmt: skip
        return {"strategy": strategy, "devices": 2, "plugins": [_Group()]}
    return {"devices": 1}
