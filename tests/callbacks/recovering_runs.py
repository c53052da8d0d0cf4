"""A small run that diverges over bad batches, and what it really did."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

BAD = range(90, 118)  # steps whose batches are shifted, long enough to be confirmed
HARMED = 90  # step before which weights leave all bounds, while the data stay good
SMALL = {"distrust": 20, "every": 15, "rewarm": 10, "confirm": 8}
RATE = 0.02


class Model(pl.LightningModule):
    """Data depend on the step only (P26); the rates and gradient norms that a step really used are remembered."""

    def __init__(self, *, bad=BAD, shift=1e3, harmed=(), optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.bad, self.shift, self.harmed, self.make_optimizer = bad, shift, harmed, optimizer
        self.losses, self.rates, self.norms, self.weights = [], [], [], []

    @property
    def step(self):
        return self.trainer.global_step

    def training_step(self, batch, index):
        step = self.step
        if step in self.harmed:
            self.layers[3].bias.data += 1e3
        self.weights.append(self.layers[0].weight.detach().clone())
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        targets = 2 * inputs[:, :4] + (self.shift if step in self.bad else 0)
        loss = (self.layers(inputs) - targets).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), lr=RATE)
        optimizer.register_step_post_hook(lambda *_: self.remember(optimizer))
        return optimizer

    def remember(self, optimizer):
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        self.norms.append(float(torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()))


def harmed(*steps, **options):
    """A model whose weights diverge by themselves."""
    return Model(bad=(), harmed=steps or (HARMED,), **options)


def fit(folder, *callbacks, steps=140, model=None, ckpt=None, saves=(), **options):
    model = model or Model()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=folder, callbacks=[*callbacks, *saves],
        enable_checkpointing=bool(saves), enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False} | options,
    )  # fmt: skip
    trainer.fit(model, DataLoader([torch.zeros(1)] * 1000, batch_size=None), ckpt_path=ckpt)
    return trainer, model


def assert_same(trainer, other):
    for name, value in other.lightning_module.state_dict().items():
        assert torch.equal(trainer.lightning_module.state_dict()[name], value), name
    mine, theirs = (item.optimizers[0].state_dict() for item in (trainer, other))
    assert mine["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert all(torch.equal(mine["state"][index][key], value) for key, value in state.items())
