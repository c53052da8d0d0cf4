"""Where the files of a run are, and that two runs never mix theirs."""

import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, rows, same_bits, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.callbacks.run_folder import RunFolder, files_of
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.records import read_records
from pretrain_merge.runtime.log import WarnOnce

pytestmark = [*LIGHTNING_REMARKS, pytest.mark.filterwarnings("ignore:Experiment logs directory")]


def fit(
    folder: Any, *callbacks: Any, seed: int = 0, options: Any = None, ckpt_path: Any = None, **own: Any
) -> tuple[ModelMerging, Any]:
    pl.seed_everything(seed, verbose=False)
    merging = ModelMerging(**({"window": 3, "every": 2} | (options or {})))
    run = trainer(folder, merging, *callbacks, **({"max_steps": 6} | own))
    module = Regression()
    run.fit(module, rows(), rows(4, seed=1), ckpt_path=ckpt_path)
    return merging, module


class Shared(MemoryLogger):
    """As W&B's: one folder for all runs, which differ in their version."""

    def __init__(self, folder: Path, version: str) -> None:
        super().__init__(folder)
        self._version = version

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return self._version


def test_p35_files_of_a_run_lie_beside_lightnings_own_checkpoints(tmp_path):
    for version in ("first", "second"):
        kept = ModelCheckpoint(save_last=True)
        fit(tmp_path / "root", kept, logger=Shared(tmp_path / "logs", version))
        folder = tmp_path / "logs" / "project" / version
        assert Path(kept.dirpath) == folder / "checkpoints"
        assert [record.step for record in read_records(folder / "merges.jsonl")] == [4, 6]
    assert not list((tmp_path / "logs").glob("merge*"))


def test_a_run_finds_its_files_again_after_another_one_began_in_its_folder(tmp_path):
    kept = {name: ModelCheckpoint(tmp_path / name, save_last=True) for name in "ab"}
    options = {"save": {"best": "val_loss"}}
    first, _ = fit(tmp_path, kept["a"], seed=1, options=options)
    measured = {record.step: record.raw for record in read_records(tmp_path / "merges.jsonl")}
    saved = Regression()
    load_merged(saved, first.best_model_path)
    fit(tmp_path, kept["b"], seed=2, options=options)
    others = (tmp_path / "merges.jsonl").read_text()
    resumed, _ = fit(tmp_path, kept["a"], seed=1, options=options, max_steps=8, ckpt_path=tmp_path / "a" / "last.ckpt")
    again = {record.step: record.raw for record in read_records(tmp_path / "merges.jsonl")}
    assert {step: again[step] for step in measured} == measured
    assert sorted(again) == [4, 6, 8]
    found = Regression()
    load_merged(found, resumed.best_model_path)
    assert resumed.last_record.step == 8
    assert resumed.best_model_path.is_relative_to(tmp_path / "merged")
    assert (tmp_path / "merges.2.jsonl").read_text() == others  # under a number, whole


def test_a_run_that_left_nothing_leaves_no_identity_however_often_it_starts(tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    for _ in range(3):
        fit(tmp_path, kept, max_steps=1)
        assert sorted(path.name for path in tmp_path.glob("merge*")) == ["merges.config.yaml", "merges.run.json"]
    fit(tmp_path, seed=2)  # another run begins, and leaves records
    others = (tmp_path / "merges.jsonl").read_text()
    fit(tmp_path, kept, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 6]
    assert (tmp_path / "merges.1.jsonl").read_text() == others
    assert sorted(path.name for path in tmp_path.glob("merges.run*")) == ["merges.run.1.json", "merges.run.json"]


def test_two_runs_at_once_in_one_folder_are_refused_and_the_remedy_works(tmp_path):
    said = []

    class Second(pl.Callback):
        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            if not said:
                with pytest.raises(CheckpointError) as error:
                    fit(tmp_path, options={"window_folder": str(tmp_path / "other")})
                said.append(str(error.value))
                fit(tmp_path / "own")

    fit(tmp_path, Second(), max_steps=12)
    assert "in use by process" in said[0]
    assert "Trainer(default_root_dir=" in said[0]
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 6, 8, 10, 12]
    assert [record.step for record in read_records(tmp_path / "own" / "merges.jsonl")] == [4, 6]
    assert not list(tmp_path.rglob("*lock"))


def test_a_second_model_of_one_trainer_is_another_run(tmp_path, caplog):
    merging = ModelMerging(window=4, every=2)
    own = trainer(tmp_path, merging, ModelCheckpoint(tmp_path / "kept"), max_steps=6)
    own.fit(Regression(), rows(), rows(4, seed=1))
    own.fit_loop.epoch_loop.max_steps = 12
    own.fit(Regression(), rows(), rows(4, seed=1))
    assert [record.recipes["sma"].steps for record in read_records(tmp_path / "merges.jsonl")] == [(8, 10), (8, 10, 12)]
    assert [record.step for record in read_records(tmp_path / "merges.1.jsonl")] == [4, 6]


def test_shares_of_a_second_model_count_its_own_steps(tmp_path):
    merging = ModelMerging(window=8, every="20%", span=0.5, forecast=None)
    own = trainer(tmp_path, merging, ModelCheckpoint(tmp_path / "kept"), max_steps=20)
    own.fit(Regression(), rows(), rows(4, seed=1))
    first = read_records(tmp_path / "merges.jsonl")
    own.fit_loop.epoch_loop.max_steps = 40
    own.fit(Regression(), rows(), rows(4, seed=1))
    second = read_records(tmp_path / "merges.jsonl")
    assert [record.step - 20 for record in second] == [record.step for record in first]
    assert [record.recipes["sma"].steps for record in second if "sma" in record.recipes] == [
        tuple(step + 20 for step in record.recipes["sma"].steps) for record in first if "sma" in record.recipes
    ]
    assert {record.since for record in second} == {20}


def test_a_change_of_the_working_directory_moves_nothing(tmp_path, monkeypatch):
    class Moves(pl.Callback):
        def on_train_batch_end(self, run: Any, *_: Any) -> None:
            if run.global_step == 3:
                (tmp_path / "elsewhere").mkdir()
                os.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    options = {"store": "disk", "store_folder": "store", "window_folder": "window", "save": {"at_end": True}}
    fit("run", Moves(), ModelCheckpoint(tmp_path / "kept"), options=options)
    assert len(read_records(tmp_path / "run" / "merges.jsonl")) == 2
    assert list((tmp_path / "run" / "merged").iterdir())
    assert list((tmp_path / "window").glob("snapshot-*"))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("root", ["memory://bucket/run", "s3://bucket/run"])
def test_a_remote_folder_is_refused_before_anything_is_written(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"needs? a local one|need a local one"):
        fit(root)
    assert not list(tmp_path.iterdir())
    fit(root, fast_dev_run=True)  # writes nothing


def test_p35_csv_and_no_logger_stay_where_they_were(tmp_path):
    fit(tmp_path / "csv", logger=CSVLogger(tmp_path / "csv"))
    fit(tmp_path / "none")
    assert (tmp_path / "csv" / "lightning_logs" / "version_0" / "merges.jsonl").exists()
    assert (tmp_path / "none" / "merges.jsonl").exists()


def test_an_identity_that_is_damaged_loses_no_records(tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path, kept)
    (tmp_path / "merges.run.json").write_text("[" * 5000)
    fit(tmp_path, kept, max_steps=8, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 6, 8]
    assert set(json.loads((tmp_path / "merges.run.json").read_text())) == {"run"}


def test_many_fits_leave_one_wrapper_of_save_checkpoint(tmp_path):
    merging = [ModelMerging(name=name, window=2, every=1) for name in ("a", "b")]
    own, module = trainer(tmp_path, *merging, max_steps=2), Regression()
    users = own.save_checkpoint
    for number in range(3):
        own.fit_loop.epoch_loop.max_steps = 2 * (number + 1)
        own.fit(module, rows(), rows(4, seed=1))
        assert own.save_checkpoint.__wrapped__ == users
        assert len(own.save_checkpoint.layers) == 2
        assert "run" not in vars(own.fit_loop)
    assert same_bits(weights(module), weights(module))
    assert torch.is_tensor(own.callback_metrics["a/sma/val_loss"])


def test_a_run_that_keeps_every_checkpoint_says_what_its_window_takes(tmp_path, caplog):
    caplog.set_level("INFO")
    fit(tmp_path, ModelCheckpoint(tmp_path / "kept", save_top_k=-1))
    said = [text for text in caplog.messages if "save_top_k=-1" in text]
    assert len(said) == 1
    assert "148 B each, at most 3 new ones" in said[0]  # 37 numbers of four bytes
    assert "keep_windows" in said[0]
    caplog.clear()
    fit(tmp_path / "bounded", ModelCheckpoint(tmp_path / "kept", save_top_k=-1), options={"keep_windows": 2})
    assert not [text for text in caplog.messages if "save_top_k=-1" in text]


@pytest.mark.parametrize("name", ["merged", "window", "Merged.1", "merges.jsonl"])
def test_a_name_of_files_of_a_run_is_refused(name):
    with pytest.raises(ConfigError, match="is that of files of a run"):
        ModelMerging(name=name)


@pytest.mark.parametrize("key", ["window_folder", "store_folder"])
def test_a_url_for_a_folder_of_ours_is_refused(key):
    with pytest.raises(ConfigError, match=f"^{key}: 's3://bucket' is a URL"):
        ModelMerging(**{key: "s3://bucket"})


@pytest.mark.parametrize("every", [1000, "20%"])
def test_a_step_on_which_nothing_is_due_takes_few_calls(every, tmp_path):
    calls: list[str] = []
    questions: list[str] = []  # to torch

    def count(frame: Any, event: str, called: Any) -> None:
        if "pretrain_merge" in frame.f_code.co_filename and event == "call":
            calls.append(frame.f_code.co_name)
        elif "pretrain_merge" in frame.f_code.co_filename and isinstance(
            getattr(called, "__self__", None), torch.Tensor
        ):
            questions.append(called.__name__)

    class Counted(ModelMerging):
        def on_before_optimizer_step(self, *arguments: Any) -> None:
            sys.setprofile(count)
            super().on_before_optimizer_step(*arguments)

        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            sys.setprofile(None)
            steps.append(len(calls) + 100 * len(questions))
            calls.clear()
            questions.clear()

    steps: list[int] = []
    callback = Counted(window=9, every=every, merge_every=10**6)
    trainer(tmp_path, callback, max_steps=29, max_epochs=-1).fit(Regression(), rows(), rows(4, seed=1))
    # steps 22 to 28: of a share of 20% the 18th is a point, and the 22nd; losses are read at each tenth
    quiet = steps[22:28]
    assert min(quiet) <= 17  # and no question to torch, which would count as a hundred
    assert quiet.count(min(quiet)) >= 4  # the same wherever nothing is due


def a_run(folder, text):
    """The files of a run that has ended; returns its identity."""
    files = RunFolder(folder)
    identity = files.begin(WarnOnce())
    files.records.write_text(text)
    (files.merged / text).mkdir(parents=True, exist_ok=True)
    files.close()
    return identity


@pytest.mark.parametrize("renames", range(7))
def test_a_run_that_is_killed_while_files_are_put_aside_loses_none(renames, tmp_path, monkeypatch):
    first = a_run(tmp_path, "first")
    second = a_run(tmp_path, "second")
    done = []

    def killed(original):
        def rename(path, target):
            if len(done) == renames:
                raise SystemExit
            done.append(target)
            return original(path, target)

        return rename

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed(Path.rename))
        patched.setattr(Path, "replace", killed(Path.replace))
        files = RunFolder(tmp_path)
        with suppress(SystemExit):
            files.resume(first, WarnOnce())  # both runs change places: three renames each
        files.close()
    third = a_run(tmp_path, "third")
    for identity, text in ((first, "first"), (second, "second"), (third, "third")):
        records, merged = files_of(identity, tmp_path)
        assert records.read_text() == text
        assert [path.name for path in merged.iterdir()] == [text]


@pytest.mark.parametrize("where", ["root", "parent", "window"])
def test_a_folder_that_the_user_names_may_be_a_link(where, tmp_path):
    (tmp_path / "lustre").mkdir()
    link = tmp_path / "scratch"
    link.symlink_to(tmp_path / "lustre")
    root = {"root": link, "parent": link / "run", "window": tmp_path / "run"}[where]
    options = {"window_folder": str(link)} if where == "window" else {}
    checkpoint = None
    for max_steps in (6, 8):  # and is found again by a run that goes on
        kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
        merging, _ = fit(root, kept, options=options, max_steps=max_steps, ckpt_path=checkpoint)
        assert merging.last_record.step == max_steps
        checkpoint = tmp_path / "kept" / "last.ckpt"
    written = tmp_path / "lustre" / ("run" if where == "parent" else "")
    assert (written / ("checkpoints.json" if where == "window" else "merges.jsonl")).is_file()


@pytest.mark.parametrize("name", ["window", "merged"])
def test_nothing_of_ours_is_written_through_a_link_inside_of_the_users_folder(name, tmp_path):
    for folder in ("lustre", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scratch").symlink_to(tmp_path / "lustre")
    (tmp_path / "lustre" / name).symlink_to(tmp_path / "elsewhere")
    # what lies at the name of the merged models is moved aside, as that of another run
    is_refused = name == "window"
    expected = pytest.raises(CheckpointError, match=r"is a link, to .* remove the link")
    with expected if is_refused else nullcontext():
        kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
        fit(tmp_path / "scratch", kept, options={"save": {"at_end": True}})
    assert list((tmp_path / "elsewhere").iterdir()) == []
