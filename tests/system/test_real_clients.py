"""Lightning scripts that were not written for this package: three changed lines at most, and the run stays the same."""

import difflib
import importlib.util
import json
import random
from textwrap import dedent

import pytest
import torch
from harness.models import LIGHTNING_REMARKS

pytestmark = [*LIGHTNING_REMARKS, pytest.mark.filterwarnings("ignore:`trainer.fit` was called without")]

# Each script is a stranger's. Where its Trainer is made, merging comes in; `model` is what it trained.
SCRIPTS = {
    "demo transformer": (
        """
        from lightning.pytorch import Trainer, seed_everything
        from lightning.pytorch.demos.transformer import LightningTransformer

        seed_everything(42)
        model = LightningTransformer(vocab_size=128)
        trainer = Trainer(max_steps=8)
        trainer.fit(model)
        """,
        [("Trainer(max_steps=8)", 'Trainer(max_steps=8, callbacks=[ModelMerging(window=3, every="2 steps")])')],
    ),
    "language model of the documentation": (
        """
        import lightning as L
        import torch
        import torch.nn.functional as F
        from lightning.pytorch.demos import Transformer, WikiText2
        from torch.utils.data import DataLoader, random_split


        class LanguageModel(L.LightningModule):
            def __init__(self, vocab_size):
                super().__init__()
                self.model = Transformer(vocab_size=vocab_size, ninp=32, nhid=32)

            def training_step(self, batch, batch_idx):
                input, target = batch
                loss = F.nll_loss(self.model(input, target), target.view(-1))
                self.log("train_loss", loss, prog_bar=True)
                return loss

            def validation_step(self, batch, batch_idx):
                input, target = batch
                self.log("val_loss", F.nll_loss(self.model(input, target), target.view(-1)), prog_bar=True)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)


        L.seed_everything(42)
        dataset = WikiText2()
        train, val = random_split(dataset, [len(dataset) - 8, 8])
        model = LanguageModel(vocab_size=dataset.vocab_size)
        trainer = L.Trainer(
            gradient_clip_val=0.25,
            max_epochs=2,
        )
        trainer.fit(model, DataLoader(train, batch_size=4, shuffle=True), DataLoader(val, batch_size=4))
        """,
        [("    max_epochs=2,", '    max_epochs=2,\n    callbacks=ModelMerging(window=3, every="2 steps"),')],
    ),
    "boring model": (
        """
        import lightning as L
        from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

        L.seed_everything(1)
        model = BoringModel()
        trainer = L.Trainer(max_epochs=1, limit_train_batches=9, limit_val_batches=2)
        trainer.fit(model, datamodule=BoringDataModule())
        """,
        [("limit_val_batches=2)", 'limit_val_batches=2, callbacks=ModelMerging(window=3, every="2 steps"))')],
    ),
    "manual optimisation": (
        """
        import lightning as L
        from lightning.pytorch.callbacks import LearningRateMonitor
        from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel

        L.seed_everything(1)
        model = ManualOptimBoringModel()
        callbacks = [LearningRateMonitor()]
        trainer = L.Trainer(max_epochs=1, limit_train_batches=9, limit_val_batches=2, callbacks=callbacks)
        trainer.fit(model)
        """,
        [
            (
                "callbacks = [LearningRateMonitor()]",
                'callbacks = [LearningRateMonitor(), ModelMerging(window=3, every="2 steps")]',
            )
        ],
    ),
    "boring model of pytorch_lightning": (
        """
        import pytorch_lightning as pl
        from pytorch_lightning.demos.boring_classes import BoringModel

        pl.seed_everything(1)
        model = BoringModel()
        trainer = pl.Trainer(max_epochs=1, limit_train_batches=9, limit_val_batches=2)
        trainer.fit(model)
        """,
        [("limit_val_batches=2)", 'limit_val_batches=2, callbacks=ModelMerging(window=3, every="2 steps"))')],
    ),
    "autoencoder of pytorch_lightning": (
        """
        import pytorch_lightning as pl
        import torch
        from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
        from torch import nn


        class LitAutoEncoder(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Sequential(nn.Linear(28, 8), nn.ReLU(), nn.Linear(8, 3))
                self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 28))

            def training_step(self, batch, batch_idx):
                (x,) = batch
                return nn.functional.mse_loss(self.decoder(self.encoder(x)), x)

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.training_step(batch, batch_idx))

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=1e-3)


        pl.seed_everything(1)
        model = LitAutoEncoder()
        data = torch.utils.data.TensorDataset(torch.randn(64, 28))
        trainer = pl.Trainer(
            max_epochs=2,
            callbacks=[
                EarlyStopping("val_loss"),
                ModelCheckpoint(monitor="val_loss"),
            ],
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, 8), torch.utils.data.DataLoader(data, 32))
        """,
        [
            (
                '        ModelCheckpoint(monitor="val_loss"),',
                '        ModelCheckpoint(monitor="val_loss"),\n        ModelMerging(window=3, every="2 steps"),',
            )
        ],
    ),
}
MEASURED = ("language model of the documentation", "autoencoder of pytorch_lightning")  # those that log a metric


def before_and_after(name):
    """The stranger's script, and the same with merging."""
    text, edits = SCRIPTS[name]
    before = after = dedent(text).lstrip()
    for old, new in edits:
        assert after.count(old) == 1
        after = after.replace(old, new)
    lines = after.splitlines(keepends=True)
    last_import = max(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    lines.insert(last_import + 1, "from pretrain_merge import ModelMerging\n")
    return before, "".join(lines)


def changed_lines(before, after):
    """Lines of the new script that the old one does not have."""
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line[1:] for line in diff if line.startswith("+") and not line.startswith("+++")]


def run(script, folder, monkeypatch):
    """Run a script as a file in an empty folder; returns its names."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_wikitext(folder / "data" / "wikitext-2.txt")
    path = folder / "train.py"
    path.write_text(script)
    specification = importlib.util.spec_from_file_location("__main__", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return vars(module)


def write_wikitext(path):
    """Where the demo looks before it downloads."""
    path.parent.mkdir()
    words = random.Random(0).choices([f"word{i}" for i in range(100)], k=1200)
    path.write_text("\n".join(" ".join(words[i : i + 20]) for i in range(0, len(words), 20)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_merging_comes_in_with_three_changed_lines_at_most(name):
    before, after = before_and_after(name)
    added = changed_lines(before, after)
    assert added[0] == "from pretrain_merge import ModelMerging"
    assert len(added) <= 3
    assert len(changed_lines(after, before)) <= 1  # lines of the stranger's that are edited, not only joined by others


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_trains_the_same_weights_and_gets_its_merges(name, tmp_path, monkeypatch):
    before, after = before_and_after(name)
    without = run(before, tmp_path / "before", monkeypatch)
    merged = run(after, tmp_path / "after", monkeypatch)
    assert_same_training(without, merged)
    (path,) = (tmp_path / "after").rglob("merges.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == list(range(4, steps[-1] + 1, 2))
    assert len(steps) >= 3
    for record in records:
        assert record["raw"].keys() == record["views"]["sma"].keys() == ({"val_loss"} if name in MEASURED else set())
    assert not list((tmp_path / "before").rglob("merges.jsonl"))


def assert_same_training(without, merged):
    one, other = without["model"].state_dict(), merged["model"].state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert without["trainer"].global_step == merged["trainer"].global_step
    metrics = {key: value for key, value in merged["trainer"].callback_metrics.items() if "merge/" not in key}
    assert metrics == without["trainer"].callback_metrics
