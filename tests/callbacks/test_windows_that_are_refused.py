"""What cannot be restored is an error that names it and the ways out, never a silently shorter window."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from callbacks.resumed_runs import (
    MARKS,
    OPTIONS,
    STEPS,
    ByStep,
    Events,
    checkpoint,
    copied,
    fit,
    lines,
    saving,
    trainer,
)
from harness.models import rows
from harness.models import trainer as plain_trainer
from safetensors.torch import load_file, save_file

from pretrain_merge import ModelMerging
from pretrain_merge.errors import CheckpointError, ConfigError

pytestmark = MARKS


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    tensors = load_file(path)
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[:-5])
    elif how in ("a flipped bit of the header", "a flipped bit of a tensor"):
        data[20 if "header" in how else -3] ^= 4
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a pickle":
        path.write_bytes(pickle.dumps({"layer.weight": [1.0]}))
    elif how == "a header of 2^63 bytes":
        path.write_bytes((2**63).to_bytes(8, "little") + data[8:])
    elif how == "a loop":
        path.symlink_to(path)
    elif how == "a link out of the folder":
        outside = path.parent.parent / "outside.safetensors"
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif how == "a folder":
        path.mkdir()
    else:
        name = next(iter(tensors))
        changed = {
            "another dtype": {**tensors, name: tensors[name].double()},
            "another shape": {**tensors, name: tensors[name].flatten()},
            "a missing tensor": {key: value for key, value in tensors.items() if key != name},
            "an extra tensor": {**tensors, "extra": torch.ones(1)},
            "foreign safetensors": {"foreign": torch.ones(3)},
        }[how]
        save_file(changed, path)


@pytest.mark.parametrize(
    "how",
    [
        "truncated", "a flipped bit of the header", "a flipped bit of a tensor", "empty", "a pickle",
        "a header of 2^63 bytes", "a link out of the folder", "another dtype", "another shape", "a missing tensor",
        "an extra tensor", "foreign safetensors",
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_that_names_it_and_both_ways_out(how, whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    state = torch.load(checkpoint(folder, 9), weights_only=True)["callbacks"]["ModelMerging[merge]"]
    name = state["values"]["window"]["values"]["snapshots"][0]["file"]["name"]
    spoil(folder / "window" / name, how)
    with pytest.raises(CheckpointError) as caught:
        fit(folder, ckpt_path=checkpoint(folder, 9), window_folder=str(folder / "window"))
    message = str(caught.value)
    assert name in message
    assert "window_folder" in message
    assert "on_missing='refill'" in message


@pytest.mark.parametrize("how", ["a loop", "a folder"])
def test_what_is_no_file_is_an_error(how, tmp_path):
    fit(tmp_path, max_steps=9)
    spoil(next((tmp_path / "window").glob("snapshot-00000008-*")), how)
    with pytest.raises(CheckpointError, match=r"snapshot-00000008-.*on_missing='refill'"):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))


def test_a_checkpoint_older_than_the_windows_that_are_kept_is_an_error_that_names_the_bound(tmp_path):
    fit(tmp_path, keep_windows=1)
    with pytest.raises(
        CheckpointError, match=r"is not there.*keep_windows: 1 keeps no older ones.*on_missing='refill'"
    ):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9), keep_windows=1)


def test_a_window_that_is_gone_is_an_error_or_an_empty_window_that_is_said(tmp_path, caplog):
    fit(tmp_path, max_steps=9)
    shutil.rmtree(tmp_path / "window")
    with pytest.raises(CheckpointError, match=r"is not there.*window_folder.*on_missing='refill'"):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9), on_missing="refill")
    assert any("the window starts empty" in message for message in caplog.messages)
    assert lines(tmp_path)[-1]["step"] == STEPS
    assert lines(tmp_path)[-1]["recipes"]["sma"]["steps"] == [12, 14, 16]


@pytest.mark.parametrize("options", [{"every": 3}, {"average": "block"}, {"slot_dtype": "bfloat16"}, {"window": 2}])
def test_a_configuration_that_makes_other_snapshots_is_an_error(options, whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    (key,) = options
    with pytest.raises(ConfigError, match=rf"{key}: .*on_missing='refill'"):
        fit(folder, ckpt_path=checkpoint(folder, 12), **options)


def test_another_model_is_an_error_that_says_what_differs(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    module = ByStep()
    module.head.float()
    with pytest.raises(CheckpointError, match=r"of another model: .*head\.weight is .*Build the model"):
        fit(folder, module=module, ckpt_path=checkpoint(folder, 9))


def test_a_checkpoint_whose_manifest_was_changed_is_an_error(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    content = torch.load(checkpoint(folder, 9), weights_only=True)
    content["callbacks"]["ModelMerging[merge]"]["values"]["progress"]["tokens"] += 1
    torch.save(content, checkpoint(folder, 9))
    with pytest.raises(CheckpointError, match="damaged"):
        fit(folder, ckpt_path=checkpoint(folder, 9))


@pytest.mark.parametrize("how", ["another key", "no key", "no callbacks"])
def test_p21_a_checkpoint_that_lost_our_state_is_an_error_and_no_empty_window(how, tmp_path, caplog):
    fit(tmp_path, max_steps=9)
    content = torch.load(checkpoint(tmp_path, 9), weights_only=True)
    ours = content["callbacks"].pop("ModelMerging[merge]")
    if how == "another key":
        content["callbacks"]["ModelMergi\x0eg[merge]"] = ours
    if how == "no callbacks":
        del content["callbacks"]
    torch.save(content, checkpoint(tmp_path, 9))
    with pytest.raises(CheckpointError, match=r"damaged.*on_missing='refill'"):
        fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9), on_missing="refill")
    assert any("the window starts empty" in message for message in caplog.messages)


def test_p21_another_name_is_an_error_and_a_further_instance_is_none(whole, tmp_path):
    folder = copied(whole, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"`name` was changed.*Set the name back"):
        fit(folder, ckpt_path=checkpoint(folder, 9), name="other")
    further = ModelMerging(**OPTIONS, name="further")
    merging = ModelMerging(**OPTIONS)
    trainer(folder, merging, Events(merging), further).fit(ByStep(), rows(64), rows(4), ckpt_path=checkpoint(folder, 9))
    assert lines(folder) == lines(whole)
    assert lines(folder / "further")[0]["step"] == 12


def test_a_run_without_the_callback_can_be_gone_on_with(tmp_path, caplog):
    plain_trainer(tmp_path, saving(tmp_path), max_steps=9, enable_checkpointing=True).fit(ByStep(), rows(64), rows(4))
    fit(tmp_path, ckpt_path=checkpoint(tmp_path, 9))
    assert any("without counters of 'merge'" in message for message in caplog.messages)
    assert lines(tmp_path)[0]["step"] == 12
