"""A resumed run counts on, records no step twice, and its checkpoint holds plain values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.watching import records
from harness.models import LIGHTNING_REMARKS, Regression, TiedModel, documents, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pretrain_merge import ModelMerging

pytestmark = LIGHTNING_REMARKS


@pytest.mark.parametrize("saved_at", [1, 3, 5])
@pytest.mark.parametrize("every", ["2 steps", "48 tokens"])
def test_a_resumed_run_counts_on_as_if_it_had_not_stopped(saved_at, every, tmp_path):
    def fit(folder: Path, steps: int, **options: Any) -> Any:
        saving = ModelCheckpoint(folder / "kept", every_n_train_steps=saved_at, save_top_k=-1, filename="{step}")
        own = trainer(folder, ModelMerging(window=2, every=every), saving, max_steps=steps)
        own.fit(TiedModel(), documents(64), documents(4, seed=1), **options)
        return {record.step: (record.samples, record.tokens) for record in records(folder)}

    whole = fit(tmp_path / "whole", 10)
    fit(tmp_path / "parts", saved_at)
    resumed = fit(tmp_path / "parts", 10, ckpt_path=tmp_path / "parts" / "kept" / f"step={saved_at}.ckpt")
    assert len(resumed) >= 2
    assert resumed == {step: whole[step] for step in resumed}
    assert max(resumed) == max(whole)


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    for options in ({}, {"ckpt_path": tmp_path / "kept" / "step=5.ckpt"}):
        own = trainer(tmp_path, ModelMerging(window=2, every=2), saving, max_steps=10)
        own.fit(Regression(), rows(), rows(4, seed=1), **options)
    assert [record.step for record in records(tmp_path)] == [4, 6, 8, 10]


@pytest.mark.parametrize("saved_at", [4, 6])
def test_a_checkpoint_of_a_run_without_the_callback_gives_its_step(saved_at, tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=saved_at, save_top_k=-1, filename="{step}")
    trainer(tmp_path, saving, max_steps=saved_at).fit(Regression(), rows())
    own = trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=10)
    own.fit(Regression(), rows(), rows(4, seed=1), ckpt_path=tmp_path / "kept" / f"step={saved_at}.ckpt")
    assert [record.step for record in records(tmp_path)] == list(range(saved_at + 4, 11, 2))
    assert any("without counters" in message for message in caplog.messages)


def test_p11_the_state_in_a_checkpoint_is_small_and_plain(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, filename="{step}")
    trainer(tmp_path, ModelMerging(window=2, every=2, save={"every": 2}), saving, max_steps=5).fit(
        TiedModel(), documents(), documents(4, seed=1)
    )
    checkpoint = torch.load(tmp_path / "kept" / "step=5.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["ModelMerging[merge]"]
    assert state["values"]["progress"]["step"] == 5
    assert len(json.dumps(state)) < 4000
    assert not any("merged" in name for name in checkpoint["state_dict"])
