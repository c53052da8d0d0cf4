"""Small real models, data and Trainers for tests that need a run, and a recorder of what a run was."""

import copy
import queue
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# What Lightning says of loaders without workers, of short epochs and of folders that exist, when warnings are errors.
LIGHTNING_REMARKS = [
    pytest.mark.filterwarnings(f"ignore:{remark}")
    for remark in (
        "The '.*_dataloader' does not have many workers",
        "The `.*_dataloader` does not have many workers",
        "The number of training batches .* is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "Consider setting `persistent_workers=True`",
        "You are using the `dataloader_iter` step flavor",
        "Found `dataloader_iter` argument in the `validation_step`",
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        "You defined a `validation_step` but have no `val_dataloader`",
        "Your `val_dataloader`'s sampler has shuffling enabled",
    )
]

WIDTH = 4


class Rows(Dataset):
    """Rows of a linear problem: inputs and targets, the same for the same seed."""

    def __init__(self, num_rows: int = 24, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num_rows, WIDTH, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(num_rows, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class AugmentedRows(Rows):
    """Rows with fresh noise at each reading, from every global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(WIDTH) + random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)), y


class Documents(Dataset):
    """Token sequences as language models get them: a mapping with `input_ids`."""

    def __init__(self, num_documents: int = 16, *, length: int = 6, vocabulary: int = 11, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(vocabulary, (num_documents, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}


class _RegressionBody:
    """Two layers with dropout; logs `train_loss` every step and `val_loss` over an epoch."""

    def __init__(self, *, lr: float = 0.05, dropout: float = 0.2) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Dropout(dropout), nn.Linear(6, 1))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x.to(self.net[0].weight.dtype)).float(), y.float())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Regression(_RegressionBody, pl.LightningModule):
    """The module of `lightning`."""


def regression_of(library: Any) -> Any:
    """The same module for `lightning.pytorch` or `pytorch_lightning`."""
    return type("Regression", (_RegressionBody, library.LightningModule), {})


class TwoOptimizers(Regression):
    """Manual optimisation: two optimizers step in every batch, so Lightning counts two steps per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.net[0].parameters(), lr=0.02),
            torch.optim.AdamW(self.net[3].parameters(), lr=0.05),
        ]


class TiedModel(pl.LightningModule):
    """A next-token model whose output layer is its embedding, with buffers of several kinds."""

    def __init__(self, *, vocabulary: int = 11, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps_seen", torch.tensor(0))
        self.register_buffer("is_warm", torch.tensor(False))

    def loss(self, batch: Any) -> Tensor:
        tokens = batch["input_ids"]
        logits = self.head(torch.tanh(self.mix(self.embedding(tokens[:, :-1]))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps_seen += 1
        self.is_warm.fill_(bool(self.steps_seen > 2))
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Witness(list):
    """Notes of hooks. It owns a queue, as what works beside a run does, so an evaluation does not take them back."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue.SimpleQueue()


class MemoryLogger(Logger):
    """A logger with nothing but what Lightning's interface demands; keeps what it is given, for runs in `save_dir`."""

    def __init__(self, save_dir: Any = None) -> None:
        super().__init__()
        self._save_dir = save_dir
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> Any:
        return self._save_dir

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        pass


def rows(num_rows: int = 24, *, seed: int = 0, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(Rows(num_rows, seed=seed), batch_size=batch_size, **options)


def documents(num_documents: int = 16, *, seed: int = 0, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(Documents(num_documents, seed=seed), batch_size=batch_size, **options)


def trainer(folder: Any, *callbacks: Any, library: Any = pl, **options: Any) -> Any:
    """A Trainer on the CPU that writes nothing unless asked to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, library.callbacks.Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1 if "max_steps" in options else 2,
    }
    return library.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | options))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nested values are equal bit for bit; NaN equals the same NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or repr(a) == repr(b))


def checksum(batch: Any) -> int:
    """One number for the tensors of a batch."""
    if isinstance(batch, Tensor):
        return zlib.crc32(_bytes(batch))
    items = list(batch.values()) if isinstance(batch, dict) else list(batch or ())
    return zlib.crc32(repr([checksum(item) for item in items]).encode())


@dataclass
class Run:
    """What a run was, so that two runs can be compared bit for bit."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    modes: list[list[bool]] = field(default_factory=list)
    train_batches: list[int] = field(default_factory=list)
    validation_batches: list[int] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    random_state: tuple[Any, ...] = ()
    lines: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    generators: list[Tensor] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)


class Recorder(pl.Callback):
    """Records the raw weights after every step, all batches, and at the end whatever a run can leave behind."""

    def __init__(self, *generators: torch.Generator) -> None:
        self.run = Run()
        self._generators = generators

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.run.weights.append(weights(pl_module))
        self.run.modes.append([part.training for part in pl_module.modules()])
        self.run.train_batches.append(checksum(batch))
        self.run.shown.append(_users_own(trainer.progress_bar_metrics))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.run.validation_batches.append(checksum(batch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self.run.schedulers = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        self.run.random_state = (torch.get_rng_state(), random.getstate(), np.random.get_state())
        self.run.generators = [generator.get_state() for generator in self._generators]
        self.run.metrics = {key: value for key, value in trainer.callback_metrics.items() if "/" not in key}
        for logger in trainer.loggers:
            self.run.lines += [
                (step, without) for step, line in getattr(logger, "lines", []) if (without := _users_own(line))
            ]


def _users_own(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without those of an instance named `merge` and of one named `late`."""
    return {key: value for key, value in metrics.items() if not key.startswith(("merge/", "late/"))}


def differences(a: Run, b: Run) -> list[str]:
    """What is not the same, bit for bit, in two runs."""
    found = [
        name
        for name in (
            "modes",
            "train_batches",
            "validation_batches",
            "optimizers",
            "schedulers",
            "random_state",
            "lines",
            "metrics",
            "shown",
        )
        if not same_bits(getattr(a, name), getattr(b, name))
    ]
    if len(a.weights) != len(b.weights):
        found.append(f"{len(a.weights)} steps and {len(b.weights)}")
    pairs = zip(a.weights, b.weights, strict=False)
    found += [f"weights after step {step}" for step, (x, y) in enumerate(pairs, start=1) if not same_bits(x, y)][:1]
    if not same_bits(a.generators, b.generators):
        found.append("generators")
    return found


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
