"""litgpt's own pre-training loop with the patch of the documentation, on a tiny model."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("litgpt.pretrain", reason="litgpt is not installed (pip install litgpt==0.5.13)")

import litgpt.pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT
from torch.utils.data import DataLoader

from pretrain_merge import load_merged

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
CONFIG = Config(name="tiny", block_size=16, padded_vocab_size=32, n_layer=1, n_head=2, n_embd=16, intermediate_size=32)


class Rows(DataModule):
    """Random rows in another order each epoch; or one row, so that a resumed run sees what it would have seen."""

    def __init__(self, num_rows):
        self.rows = torch.randint(0, 32, (num_rows, 17), generator=torch.Generator().manual_seed(0))

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.rows, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows.flip(1), self.batch_size, shuffle=True)


def patched():
    """litgpt's module with the lines of the page in it, and how many they are."""
    (diff,) = re.findall(r"## litgpt\n.*?```diff\n(.*?)```", PAGE.read_text(), re.S)
    source, num_added = Path(litgpt.pretrain.__file__).read_text(), 0
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        after = "\n".join(line[1:] for line in lines)
        assert source.count(before) == 1, f"litgpt has changed: {before}"
        source = source.replace(before, after)
        num_added += sum(line.startswith("+") for line in lines)
    return source, num_added


def run(folder, *, source=None, num_rows=12, max_steps=30, resume=False, monkeypatch):
    """Weights after training."""
    path = folder.parent / f"pretrain_{folder.name}.py"
    path.write_text(source or Path(litgpt.pretrain.__file__).read_text())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # litgpt puts its loader into checkpoints
    monkeypatch.setattr(module, "save_hyperparameters", lambda *_: None)  # reads the command line
    module.setup(
        "tiny",
        model_config=CONFIG,
        out_dir=folder,
        precision="32-true",
        data=Rows(num_rows),
        resume=resume,
        devices=1,
        logger_name="csv",
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        train=TrainArgs(
            global_batch_size=4, micro_batch_size=2, max_tokens=max_steps * 4 * 16, max_norm=1.0, min_lr=1e-2,
            lr_warmup_steps=0, save_interval=10, log_interval=5,
        ),
        eval=EvalArgs(interval=10, max_iters=2, final_validation=False),
    )  # fmt: skip
    monkeypatch.undo()
    return torch.load(folder / "final" / "lit_model.pth", weights_only=False)  # litgpt puts its loader in


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


pytestmark = pytest.mark.filterwarnings("ignore")  # litgpt's own


def test_the_patch_has_at_most_eight_lines_and_training_is_untouched(tmp_path, monkeypatch):
    source, num_added = patched()
    assert num_added <= 8
    without = run(tmp_path / "without", monkeypatch=monkeypatch)
    with_ = run(tmp_path / "with", source=source, monkeypatch=monkeypatch)
    assert equal(with_["model"], without["model"])
    logged = next((tmp_path / "with").rglob("metrics.csv")).read_text()
    assert "merge/raw/val_loss" in logged
    assert "merge/sma/val_loss" in logged


def test_its_own_resume_goes_on_with_the_window_and_names_are_litgpts(tmp_path, monkeypatch):
    source, _ = patched()
    whole = run(tmp_path / "whole", source=source, num_rows=1, monkeypatch=monkeypatch)
    run(tmp_path / "part", source=source, num_rows=1, max_steps=20, monkeypatch=monkeypatch)
    (tmp_path / "part" / "merged" / "final-sma").rename(tmp_path / "early")
    again = run(tmp_path / "part", source=source, num_rows=1, resume="auto", monkeypatch=monkeypatch)
    assert equal(whole["model"], again["model"])
    merged = []
    for name in ("whole", "part"):
        model = GPT(CONFIG)
        load_merged(model, tmp_path / name / "merged" / "final-sma")
        merged.append(model.state_dict())
    assert equal(*merged)
    assert merged[0].keys() == whole["model"].keys()
    assert not equal(merged[0], whole["model"])
