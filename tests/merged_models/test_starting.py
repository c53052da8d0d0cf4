"""A fit that begins from a merge has its weights, and nobody replaces them without a word."""

import lightning.pytorch as lightning
import pytest
import torch
from torch.utils.data import DataLoader

from pretrain_merge import start_from_merged
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.merged_models.merged import save_merged

PROVENANCE = {"steps": [100, 200], "coefficients": [0.5, 0.5], "view": "sma", "step": 200}


class Model(lightning.LightningModule):
    """One layer; `hooks` are called at their time with the module."""

    def __init__(self, value, **hooks):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.constant_(self.layer.weight, value)
        self.hooks, self.first = hooks, None

    def call(self, name):
        self.hooks.get(name, lambda module: None)(self)

    def setup(self, stage):
        self.call("setup")

    def on_fit_start(self):
        self.call("on_fit_start")

    def on_train_batch_end(self, *_):
        self.call("on_train_batch_end")

    def training_step(self, batch, batch_idx):
        if self.first is None:
            self.first = self.layer.weight.detach().clone()
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.fixture
def folder(tmp_path):
    save_merged(Model(7.0), tmp_path / "merged", PROVENANCE)
    return tmp_path / "merged"


def fit(module, path, ckpt_path=None, max_steps=2):
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    trainer.fit(module, DataLoader(torch.ones(8, 2), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def test_a_fit_begins_from_the_merge_and_at_step_0(folder, tmp_path):
    module = Model(1.0)
    fit(module, tmp_path)  # also after a fit of its own
    about = start_from_merged(module, folder)
    assert about["steps"] == [100, 200]
    module.first = None
    trainer = fit(module, tmp_path)
    assert torch.equal(module.first, torch.full((1, 2), 7.0))
    assert trainer.global_step == 2


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_a_hook_before_the_first_step_may_do_it(hook, folder, tmp_path):
    module = Model(1.0, **{hook: lambda module: start_from_merged(module, folder)})
    fit(module, tmp_path)
    assert torch.equal(module.first, torch.full((1, 2), 7.0))


def test_what_a_fit_has_resumed_is_not_written_over(folder, tmp_path):
    trainer = fit(Model(1.0), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer.lightning_module.layer.weight.detach().clone()
    module = Model(1.0, on_fit_start=lambda module: start_from_merged(module, folder))
    with pytest.raises(ConfigError, match=r"last\.ckpt.*before fit"):
        fit(module, tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=4)
    assert torch.equal(module.layer.weight, resumed), "nothing was written"


def test_an_optimizer_that_has_stepped_is_of_other_weights(folder, tmp_path):
    module = Model(1.0, on_train_batch_end=lambda module: start_from_merged(module, folder))
    with pytest.raises(ConfigError, match=r"at step 1 of a fit.*load_merged"):
        fit(module, tmp_path)


def test_weights_are_verified_as_load_merged_verifies_them(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    module = Model(1.0)
    with pytest.raises(CheckpointError, match="damaged"):
        start_from_merged(module, folder)
    assert torch.equal(module.layer.weight, torch.full((1, 2), 1.0))
