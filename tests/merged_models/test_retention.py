"""Which merged models are written and which go, alone and through restarts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import LIGHTNING_REMARKS
from merged_models.saved_models import saved
from torch import nn

from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig
from pretrain_merge.errors import ConfigError
from pretrain_merge.files.atomic import remove_leftovers
from pretrain_merge.files.folders import discard
from pretrain_merge.merged_models.merged import holds_weights_of
from pretrain_merge.merged_models.retention import MergedModels, SavedModels
from pretrain_merge.records import Recipe

pytestmark = LIGHTNING_REMARKS


def models(folder: Path, start: Progress | None = None, **options: Any) -> MergedModels:
    return MergedModels(folder / "merged", SaveConfig(**options), {"window": 3}, start)


def keep(own: MergedModels, step: int, *, view: str = "sma", **metrics: float) -> None:
    recipe = Recipe((step - 1, step), (0.5, 0.5))
    own.save_if_due(nn.Linear(1, 1), view, Progress(step, step * 2, step * 10), recipe, metrics)


def test_nothing_is_written_unless_asked(tmp_path):
    keep(models(tmp_path), 10, val_loss=1.0)
    assert saved(tmp_path) == []


def test_every_saves_the_first_merge_after_each_multiple_and_keeps_the_newest(tmp_path):
    own = models(tmp_path, every=20, keep=2)
    for step in range(7, 100, 7):
        keep(own, step)
    # 21, 42, 63 and 84 are the first merges at or after 20, 40, 60 and 80
    assert saved(tmp_path) == ["step-00000063-sma", "step-00000084-sma"]


def test_every_can_count_tokens(tmp_path):
    own = models(tmp_path, every="150 tokens", keep=9)
    for step in range(5, 50, 5):
        keep(own, step)
    assert saved(tmp_path) == ["step-00000015-sma", "step-00000030-sma", "step-00000045-sma"]


def test_each_view_has_a_periodic_series_of_its_own(tmp_path):
    own = models(tmp_path, every=10)
    for step in (10, 20):
        for view in ("sma", "wma"):
            keep(own, step, view=view)
    assert saved(tmp_path) == ["step-00000020-sma", "step-00000020-wma"]


@pytest.mark.parametrize(("mode", "best"), [("min", "step-00000020-wma"), ("max", "step-00000030-sma")])
def test_best_keeps_one_model_over_all_views(mode, best, tmp_path):
    own = models(tmp_path, best="score", mode=mode)
    for step, sma, wma in ((10, 5.0, 6.0), (20, 4.0, 3.0), (30, 7.0, float("nan")), (40, 6.0, 4.5)):
        keep(own, step, score=sma)
        keep(own, step, view="wma", score=wma)
    assert saved(tmp_path) == [best]
    assert own.best_path == tmp_path / "merged" / best


def test_a_model_that_is_best_outlives_its_turn_as_periodic(tmp_path):
    own = models(tmp_path, every=10, keep=1, best="score")
    for step, score in ((10, 1.0), (20, 2.0), (30, 3.0)):
        keep(own, step, score=score)
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000030-sma"]
    keep(own, 35, score=0.5)
    assert saved(tmp_path) == ["step-00000030-sma", "step-00000035-sma"]


def test_best_of_a_metric_that_is_not_measured_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"save\.best: 'val_los' was not measured\. Measured: val_loss, f1\."):
        keep(models(tmp_path, best="val_los"), 10, val_loss=1.0, f1=2.0)


def test_what_was_saved_is_known_after_a_restart(tmp_path):
    own = models(tmp_path, every=10, keep=1, best="score")
    for step, score in ((10, 1.0), (20, 2.0)):
        keep(own, step, score=score)
    state = own.state()
    own = models(tmp_path, Progress(20, 40, 200), every=10, keep=1, best="score")
    own.resume_from(state, tmp_path / "merged")
    keep(own, 25, score=3.0)  # neither due nor better
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000020-sma"]
    keep(own, 30, score=4.0)
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000030-sma"]
    assert own.best_path.name == "step-00000010-sma"


def test_a_best_model_that_is_gone_is_not_best(tmp_path):
    own = models(tmp_path, best="score")
    gone = "step-00000001-sma"
    own.resume_from(SavedModels(periodic={"sma": (gone,)}, best=gone, best_score=0.1), tmp_path / "merged")
    keep(own, 10, score=1.0)
    assert own.best_path.name == "step-00000010-sma"


def test_a_run_that_goes_on_in_a_copy_of_its_folder_deletes_nothing_of_the_original(tmp_path):
    own = models(tmp_path / "original", every=10, keep=1, best="score")
    keep(own, 10, score=1.0)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copy = models(tmp_path / "copy", every=10, keep=1, best="score")
    copy.resume_from(own.state(), tmp_path / "original" / "merged")
    for step, score in ((20, 0.5), (30, 0.1)):
        keep(copy, step, score=score)
    assert saved(tmp_path / "original") == ["step-00000010-sma"]
    assert saved(tmp_path / "copy") == ["step-00000030-sma"]


def test_a_run_that_goes_on_in_a_new_folder_knows_the_best_before_and_leaves_it_there(tmp_path):
    own = models(tmp_path / "first", every=10, keep=1, best="score")
    keep(own, 10, score=1.0)
    second = models(tmp_path / "second", every=10, keep=1, best="score")
    second.resume_from(own.state(), own.folder)
    third = models(tmp_path / "third", every=10, keep=1, best="score")
    third.resume_from(second.state(), second.folder)
    keep(third, 15, score=2.0)
    assert third.best_path == tmp_path / "first" / "merged" / "step-00000010-sma"
    keep(third, 25, score=0.5)
    assert saved(tmp_path / "first") == ["step-00000010-sma"]
    assert third.best_path == tmp_path / "third" / "merged" / "step-00000025-sma"


@pytest.mark.parametrize("name", ["..", ".", "../window", "step-00000010-sma/../../../precious", "notes"])
def test_a_checkpoint_that_names_another_folder_makes_nothing_go_there(name, tmp_path):
    for path in (tmp_path / "window", tmp_path / "merged" / "notes", tmp_path.parent / "precious"):
        path.mkdir(parents=True, exist_ok=True)
    own = models(tmp_path, every=10, keep=1, best="score")
    own.resume_from(SavedModels(periodic={"sma": (name,)}, best=name, best_score=9.0), tmp_path / "merged")
    keep(own, 10, score=1.0)
    assert saved(tmp_path) == ["notes", "step-00000010-sma"]
    assert (tmp_path / "window").exists()
    assert (tmp_path.parent / "precious").exists()


def test_a_view_not_yet_merged_keeps_its_turn_through_a_restart(tmp_path):
    own = models(tmp_path, every=20)
    keep(own, 15)
    again = models(tmp_path, Progress(25, 50, 250), every=20)
    again.resume_from(own.state(), own.folder)
    keep(again, 30, view="wma")  # the first merge of this view, at or after 20
    assert saved(tmp_path) == ["step-00000030-wma"]


def test_a_model_whose_deletion_was_broken_off_looks_incomplete(tmp_path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    keep(models(tmp_path, every=10), 10)
    monkeypatch.setattr("pretrain_merge.files.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "merged" / "step-00000010-sma")
    monkeypatch.undo()
    (left,) = saved(tmp_path)
    assert left.endswith(".tmp")
    remove_leftovers(tmp_path / "merged")
    assert saved(tmp_path) == []


def test_the_same_merge_is_not_written_twice(tmp_path):
    torch.manual_seed(1)
    keep(models(tmp_path, every=10), 10)
    path = tmp_path / "merged" / "step-00000010-sma" / "model.safetensors"
    before = path.stat().st_ino
    torch.manual_seed(1)
    keep(models(tmp_path, every=10), 10)
    assert path.stat().st_ino == before
    assert saved(tmp_path) == ["step-00000010-sma"]


def test_what_a_run_left_that_went_another_way_is_moved_aside_and_not_taken_for_ours(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        keep(models(tmp_path, every=10), 10)
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000010-sma.1"]
    torch.manual_seed(2)
    assert holds_weights_of(nn.Linear(1, 1), tmp_path / "merged" / "step-00000010-sma")
