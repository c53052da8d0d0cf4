"""A run that leaves checkpoints, and ways to evaluate them that a user can name."""

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pretrain_merge import ModelMerging

VIEWS = ["sma", "sma3", {"name": "all", "kind": "decay", "shape": "1-sqrt", "span": None}, "sma5"]
WINDOW = 5


class Model(lightning.LightningModule):
    """Learns squares; warms up, then stays at one rate. Counts its batches in a float buffer."""

    def __init__(self, width=16, falls_at=10**9):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
        self.register_buffer("seen", torch.zeros(()))
        self.falls_at = falls_at

    def training_step(self, batch, index):
        self.seen += 1
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))
        self.log("seen", self.seen)
        self.log("drawn", torch.rand(()))

    def loss(self, batch):
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def factor(self, step):
        return min(1.0, (step + 1) / 20) if step < self.falls_at else 0.5


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(squares(400, 1), 4)

    def val_dataloader(self):
        return DataLoader(squares(64, 2), 16)


def squares(number, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 8, generator=generator)
    return TensorDataset(x, (x**2).sum(1, keepdim=True) / 8)


def evaluation():
    return Model(), Data().val_dataloader()


def number():
    return 3


def train(root, *, model=None, steps=100, merging=True, **options):
    """A run with checkpoints every 10 steps, and with merging on, so that it has records to compare with."""
    lightning.seed_everything(0, verbose=False)
    callback = ModelMerging(window=WINDOW, every="10 steps", views=VIEWS, tokens_per_batch=1, forecast=None, **options)
    checkpoints = ModelCheckpoint(
        dirpath=root / "checkpoints", filename="{step}", every_n_train_steps=10, save_top_k=-1, save_last=True
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[*([callback] if merging else []), checkpoints],
        default_root_dir=root, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model or Model(), datamodule=Data())
    return root
