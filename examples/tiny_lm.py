"""What the examples train: a byte-level language model that stands for yours. Nothing here knows of merging."""

import argparse
import inspect

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class TinyLM(L.LightningModule):
    """Predicts every byte of a text from the bytes before it, at constant learning rate."""

    def __init__(self, width: int = 32, lr: float = 3e-2) -> None:
        super().__init__()
        self.lr = lr
        self.embedding = nn.Embedding(256, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next byte: (batch, length) to (batch, length, 256)."""
        logits: Tensor = self.head(self.recurrence(self.embedding(input_ids))[0])
        return logits

    def loss(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy per byte, in nats."""
        return nn.functional.cross_entropy(self(input_ids[:, :-1]).flatten(0, 1), input_ids[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch["input_ids"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch["input_ids"]), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Blocks(Dataset[dict[str, Tensor]]):
    """A text in blocks of `length` bytes."""

    def __init__(self, text: str, length: int = 33) -> None:
        tokens = torch.tensor(list(text.encode()))
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index]}


class Text(L.LightningDataModule):
    """The source code of Python's argparse; its last eighth is for validation."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        text = inspect.getsource(argparse)
        cut = len(text) * 7 // 8
        self.train, self.val = Blocks(text[:cut]), Blocks(text[cut:])

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.val, 64)


def show(trainer: L.Trainer) -> None:
    """Print the last merge."""
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith("merge/"):
            print(f"{name:28} {float(value):10.4f}")
