"""A merge or one snapshot as what others read: Lightning tests and goes on with it, Hugging Face loads it."""

import collections
import datetime
import json
import warnings
from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from offline import writers
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from pretrain_merge import ModelMerging, load_merged, merge_checkpoints, save_merged
from pretrain_merge.errors import CheckpointError, ConfigError, MergeInputError
from pretrain_merge.merged_models.choosing import chosen
from pretrain_merge.offline import lightning_file, mapped
from pretrain_merge.offline.export import export_checkpoint


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader():
    return DataLoader(torch.arange(32.0).view(8, 4), batch_size=1)


def trainer(folder, *callbacks, steps):
    return pl.Trainer(
        default_root_dir=folder, max_steps=steps, logger=False, accelerator="cpu", callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8 steps with a checkpoint and a snapshot at every second one, and its merge kept."""
    folder = tmp_path_factory.mktemp("run")
    merging = ModelMerging(window=4, every=2, save={"at_end": True, "best": "val_loss"})
    checkpoints = ModelCheckpoint(folder / "checkpoints", save_top_k=-1, every_n_train_steps=2, filename="{step}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, merging, checkpoints, steps=8).fit(Module(), loader(), loader())
    return folder


def paths(run):
    return sorted((run / "checkpoints").glob("*.ckpt"))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_old_checkpoints_give_the_merge_that_the_callback_made_in_the_run(run, tmp_path):
    merge_checkpoints(run / "checkpoints", tmp_path / "out", average=["*"])
    live = load_file(chosen(run, "last") / "model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == live.keys()
    assert all(torch.equal(found[name], live[name]) for name in live)


def test_a_merge_as_a_checkpoint_is_tested_and_gone_on_with(run, tmp_path):
    merge_checkpoints(paths(run), tmp_path / "merged")
    path = export_checkpoint(tmp_path / "merged", tmp_path / "merged.ckpt", to="ckpt", base=paths(run)[-1])
    merged = load_file(tmp_path / "merged/model.safetensors")
    expected = Module()
    expected.load_state_dict(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tested = trainer(tmp_path, steps=8).test(Module(), loader(), ckpt_path=path, verbose=False)[0]["val_loss"]
        goes_on = trainer(tmp_path, steps=10)
        goes_on.fit(Module(), loader(), loader(), ckpt_path=path)
    rows = torch.cat(list(loader()))
    assert tested == pytest.approx(expected.layer(rows).square().mean().item(), rel=1e-5)
    assert goes_on.global_step == 10
    before, after = (torch.load(item, weights_only=True) for item in (paths(run)[-1], path))
    assert not any(key.startswith("ModelMerging") for key in after["callbacks"])
    assert before["loops"] == after["loops"]
    moments = [item["optimizer_states"][0]["state"][0]["exp_avg"] for item in (before, after)]
    assert torch.equal(*moments)


def test_a_merge_of_lightnings_averages_is_what_a_fit_with_them_goes_on_from(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "ema", save_top_k=-1, every_n_train_steps=2, filename="{step}")
    begun_with = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            begun_with.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, EMAWeightAveraging(decay=0.9), checkpoints, steps=4).fit(Module(), loader())
        saved = sorted((tmp_path / "ema").glob("*.ckpt"))
        assert "current_model_state" in torch.load(saved[-1], weights_only=True)
        merge_checkpoints(saved, tmp_path / "merged")
        path = export_checkpoint(tmp_path / "merged", tmp_path / "merged.ckpt", to="ckpt", base=saved[-1])
        trainer(tmp_path, EMAWeightAveraging(decay=0.9), Look(), steps=5).fit(Module(), loader(), ckpt_path=path)
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(begun_with[name], value) for name, value in merged.items())


def test_optimizer_states_can_be_the_mean_or_left_out(run, tmp_path):
    merge_checkpoints(paths(run), tmp_path / "merged", optimizer="average")
    averaged = export_checkpoint(
        tmp_path / "merged", tmp_path / "a.ckpt", to="ckpt", base=paths(run)[-1], optimizer="average"
    )
    states = [torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0] for path in paths(run)]
    found = torch.load(averaged, weights_only=True)["optimizer_states"][0]["state"][0]
    torch.testing.assert_close(found["exp_avg"], sum(state["exp_avg"] for state in states) / len(states))
    assert found["step"] == states[-1]["step"]
    dropped = export_checkpoint(
        tmp_path / "merged", tmp_path / "d.ckpt", to="ckpt", base=paths(run)[-1], optimizer="drop"
    )
    assert "optimizer_states" not in torch.load(dropped, weights_only=True)
    merge_checkpoints(paths(run), tmp_path / "plain")
    with pytest.raises(ConfigError, match="has none"):
        export_checkpoint(tmp_path / "plain", tmp_path / "e.ckpt", to="ckpt", base=paths(run)[-1], optimizer="average")


def test_one_snapshot_of_a_window_is_the_checkpoint_of_its_step(run, tmp_path):
    snapshot = min((run / "window").glob("snapshot-*4-*.safetensors"))
    path = export_checkpoint(snapshot, tmp_path / "snapshot.ckpt", to="ckpt", base=paths(run)[-1])
    of_step = next(weights(item) for item in paths(run) if item.stem == "step=4")
    assert torch.equal(weights(path)["layer.weight"], of_step["layer.weight"])
    assert weights(path)["seen"] == 8  # of the base: a snapshot has no buffers


def test_load_merged_finds_the_best_and_the_last_of_a_run(run, tmp_path):
    for which in ("best", "last"):
        model = Module()
        about = load_merged(model, run, which=which)
        assert torch.equal(model.layer.weight, load_file(chosen(run, which) / "model.safetensors")["layer.weight"])
        assert about["step"] == json.loads((chosen(run, which) / "provenance.json").read_text())["step"]
    with pytest.raises(ConfigError, match="'best', 'last'"):
        load_merged(Module(), run, which="newest")
    with pytest.raises(CheckpointError, match="which='last'"):
        load_merged(Module(), tmp_path, which="best")
    with pytest.raises(CheckpointError, match="no merged model"):
        load_merged(Module(), tmp_path, which="last")


def test_last_goes_by_the_step_and_not_by_the_name(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save_merged(Module(), tmp_path / "merged" / f"step-{step:08}-sma", {"step": step})
    assert chosen(tmp_path, "last").name == "step-100000000-sma"


def test_a_model_in_a_wrapper_becomes_a_folder_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for step in (1, 2):
        torch.manual_seed(step)
        models.append(transformers.LlamaForCausalLM(config))
        state = {f"net.{name}": value for name, value in models[-1].state_dict().items()}
        writers.lightning(tmp_path, step, state)
    models[0].save_pretrained(tmp_path / "start")
    merge_checkpoints(sorted(tmp_path.glob("*.ckpt")), tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"config\.json"):
        export_checkpoint(tmp_path / "merged", tmp_path / "hf", to="hf")
    export_checkpoint(tmp_path / "merged", tmp_path / "hf", to="hf", base=tmp_path / "start")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    for name, value in loaded.state_dict().items():
        mean = sum(model.state_dict()[name] for model in models) / 2
        torch.testing.assert_close(value, mean)


@pytest.mark.parametrize(
    ("options", "error", "piece"),
    [
        ({"to": "onnx"}, ConfigError, "'safetensors'"),
        ({"to": "ckpt"}, ConfigError, "last.ckpt"),
        ({"to": "ckpt", "base": "other.ckpt"}, MergeInputError, "layer.weight"),
        ({"to": "ckpt", "base": "missing.ckpt"}, CheckpointError, "missing.ckpt"),
    ],
)
def test_what_cannot_be_exported_says_why(run, tmp_path, monkeypatch, options, error, piece):
    monkeypatch.chdir(tmp_path)
    writers.lightning(tmp_path, 1, {"w": torch.ones(1)}).rename(tmp_path / "other.ckpt")
    with pytest.raises(error, match=piece):
        export_checkpoint(chosen(run, "last"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_lets_go_of_mapped_files_as_it_writes(run, tmp_path, monkeypatch):
    """Else both models and the optimizer's states, twice as large, would be resident at its end."""
    held, released = [], []
    real, load = mapped.MappedTensors.release, torch.load
    monkeypatch.setattr(lightning_file, "_HELD", 0)
    monkeypatch.setattr(mapped.MappedTensors, "release", lambda own: released.append(own._source.place) or real(own))
    monkeypatch.setattr(
        torch, "load", lambda *arguments, **options: held.append(load(*arguments, **options)) or held[-1]
    )
    base, folder = paths(run)[-1], chosen(run, "last")
    export_checkpoint(folder, tmp_path / "out.ckpt", to="ckpt", base=base)
    assert {*released} == {str(folder), str(base)}
    states = held[0]["optimizer_states"][0]["state"]
    expected = load(base, weights_only=True)["optimizer_states"][0]["state"]
    assert states.keys() == expected.keys()
    assert all(torch.equal(states[key][name], value) for key in expected for name, value in expected[key].items())
    written = load(tmp_path / "out.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert all(torch.equal(written[key][name], value) for key in expected for name, value in expected[key].items())


def test_hyperparameters_of_libraries_are_passed_over_by_a_merge_and_kept_by_an_export(tmp_path):
    values = {
        "config": OmegaConf.create({"a": {"b": [1, "x", None]}, "c": "${a.b}"}), "path": Path("/data/x"),
        "numbers": [np.float64(2.5), np.int64(3), np.arange(3.0)], "set": {1, 2}, "when": datetime.timedelta(3),
        "range": range(3), "complex": 1j, "bytes": b"x", "dtype": torch.bfloat16, 7: Namespace(rate=1),
    }  # fmt: skip
    for step in (1, 3):
        writers.lightning(tmp_path, step, {"w": torch.full((2,), float(step))}, hyper_parameters=values)
    base = tmp_path / "epoch=0-step=3.ckpt"
    merge_checkpoints(sorted(tmp_path.glob("*.ckpt")), tmp_path / "merged")
    export_checkpoint(tmp_path / "merged", tmp_path / "out.ckpt", to="ckpt", base=base)
    found = torch.load(tmp_path / "out.ckpt", weights_only=False)
    assert str(found["hyper_parameters"]) == str(values)
    assert found["state_dict"]["w"].tolist() == [2.0, 2.0]


def test_a_value_that_torch_does_not_write_back_is_an_error_of_ours(tmp_path):
    base = writers.lightning(tmp_path, 1, {"w": torch.ones(2)}, hyper_parameters=collections.deque([1]))
    merge_checkpoints([base], tmp_path / "merged")
    with pytest.raises(CheckpointError, match="cannot be written again"):
        export_checkpoint(tmp_path / "merged", tmp_path / "out.ckpt", to="ckpt", base=base)
