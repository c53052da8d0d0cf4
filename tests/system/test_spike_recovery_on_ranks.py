"""All ranks go back together, whichever saw it, and a resumed run does the same: DDP and FSDP2 on gloo processes."""

from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from harness.rank_trainers import Group, strategy
from harness.ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from pretrain_merge import SpikeRecovery

OPTIONS = {"distrust": 20, "every": 15, "rewarm": 10, "confirm": 8}
STEPS = 115


class Model(pl.LightningModule):
    """Bad batches on rank 1 alone, whose losses its ranks must agree on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))

    def configure_model(self):
        if "ModelParallel" in type(self.trainer.strategy).__name__ and not isinstance(self.layers[0].weight, DTensor):
            fully_shard(self.layers[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        step, rank = self.trainer.global_step, self.trainer.global_rank
        inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(2 * step + rank))
        shift = 1e3 if rank == 1 and 80 <= step < 98 else 0
        return (self.layers(inputs) - 2 * inputs[:, :4] - shift).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def train(kind, folder, resume_at, options):
    recovery = SpikeRecovery(**OPTIONS, **options)
    saving = pl.callbacks.ModelCheckpoint(dirpath=f"{folder}/saved", filename="{step}", every_n_train_steps=5,
                                          save_top_k=-1)  # fmt: skip
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, default_root_dir=folder, callbacks=[recovery, saving],
        strategy=strategy(kind), devices=2, plugins=[Group()], use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model()
    checkpoint = f"{folder}/saved/step={resume_at}.ckpt" if resume_at else None
    trainer.fit(model, DataLoader([torch.zeros(1)] * 1000, batch_size=None), ckpt_path=checkpoint)
    whole = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }
    (done,) = recovery.recoveries
    return {"weights": whole, "done": asdict(done)}


@pytest.mark.parametrize(("kind", "options"), [("ddp", {}), ("fsdp2", {"optimizer": "newest", "store": "disk"})])
def test_all_ranks_go_back_together_and_a_resumed_run_does_the_same(kind, options, tmp_path):
    whole = on_ranks(train, kind, str(tmp_path), 0, options, timeout=200)
    for one in whole:
        assert one["done"] == whole[0]["done"]
        assert 80 < one["done"]["onset"] <= 86
        assert (one["done"]["cause"], one["done"]["back_to"]) == ("data", (75,))
        assert all(torch.equal(value, whole[0]["weights"][name]) for name, value in one["weights"].items())
        assert all(value.abs().max() < 10 for value in one["weights"].values())
    step = whole[0]["done"]["step"]  # before the cause is told
    for one in on_ranks(train, kind, str(tmp_path), step, options, timeout=200):
        assert all(torch.equal(value, whole[0]["weights"][name]) for name, value in one["weights"].items())
    assert len((Path(tmp_path) / "recoveries.jsonl").read_text().splitlines()) == 1
