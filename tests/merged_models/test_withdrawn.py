"""Merged models that a spike takes back: never the best, deleted in their turn, and each says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from merged_models.saved_models import saved
from torch import nn

from pretrain_merge import load_merged
from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig
from pretrain_merge.errors import CheckpointError
from pretrain_merge.merged_models.choosing import BEST
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.records import Recipe


def models(folder: Path, **options: Any) -> MergedModels:
    return MergedModels(folder / "merged", SaveConfig(**options), {})


def keep(own: MergedModels, step: int, *, trusted_until: int | None = None, **metrics: float) -> None:
    recipe, now = Recipe((step - 1, step), (0.5, 0.5)), Progress(step, step * 2, step * 10)
    own.save_if_due(nn.Linear(1, 1), "sma", now, recipe, metrics, trusted_until=trusted_until)


def note(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merged" / BEST).read_text())
    return found


def why_withdrawn(folder: Path, name: str) -> str | None:
    about = json.loads((folder / "merged" / name / "provenance.json").read_text())
    return about.get("withdrawn")


def test_a_withdrawn_model_is_never_the_best_and_says_why(tmp_path):
    own = models(tmp_path, every=20, keep=2, best="score")
    for step, score in ((10, 3.0), (20, 2.0), (30, 1.0)):
        keep(own, step, score=score, trusted_until=step - 15)
    assert note(tmp_path)["folder"] == "step-00000030-sma"
    own.withdraw(15, "a spike")
    assert own.best_path.name == note(tmp_path)["folder"] == "step-00000010-sma"
    assert note(tmp_path)["withdrawn"] == {"step-00000020-sma": "a spike", "step-00000030-sma": "a spike"}
    # 30 was there as the best only; 20 is kept by its turn
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000020-sma"]
    assert why_withdrawn(tmp_path, "step-00000020-sma") == "a spike"
    assert why_withdrawn(tmp_path, "step-00000010-sma") is None
    keep(own, 50, score=2.5, trusted_until=35)
    assert own.best_path.name == "step-00000050-sma"  # better than what was left


def test_without_a_model_from_before_there_is_no_best_and_the_reason_is_told(tmp_path):
    own = models(tmp_path, every=10, best="score")
    keep(own, 10, score=1.0, trusted_until=0)
    own.withdraw(5, "a spike from step 12 on")
    assert own.best_path is None
    with pytest.raises(CheckpointError, match=r"step-00000010-sma was withdrawn: a spike from step 12 on"):
        load_merged(nn.Linear(1, 1), tmp_path, which="best")
    with pytest.raises(CheckpointError, match=r"every merged model .* was withdrawn .a spike from step 12"):
        load_merged(nn.Linear(1, 1), tmp_path, which="last")


def test_the_last_merged_model_is_one_that_was_not_withdrawn(tmp_path, caplog):
    own = models(tmp_path, every=10, keep=3)
    for step in (10, 20, 30):
        keep(own, step)
    own.withdraw(20, "a spike")
    assert load_merged(nn.Linear(1, 1), tmp_path, which="last")["step"] == 20
    caplog.clear()
    load_merged(nn.Linear(1, 1), tmp_path / "merged" / "step-00000030-sma")
    assert "step-00000030-sma was withdrawn (a spike)" in caplog.text


@pytest.mark.parametrize("improves", [True, False])
def test_models_that_stand_in_for_the_best_are_at_most_two_and_end_with_the_run(improves, tmp_path):
    own = models(tmp_path, best="score")
    for step in range(10, 400, 10):
        keep(own, step, score=-step if improves else step, trusted_until=step - 100)
        assert len(saved(tmp_path)) <= 3
    if improves:  # a spike that reaches as far as it may leaves one that is not much older
        own.withdraw(290, "a spike")
        assert 100 <= int(own.best_path.name[5:13]) <= 290
    own.finish()
    assert saved(tmp_path) == [own.best_path.name]


def test_a_run_that_goes_on_from_before_a_spike_has_withdrawn_nothing_yet(tmp_path):
    own = models(tmp_path, every=10, keep=2, best="score")
    for step, score in ((10, 2.0), (20, 1.0)):
        keep(own, step, score=score, trusted_until=0)
    before = own.state()
    own.withdraw(15, "a spike")
    after = own.state()
    states = {}
    for name, state in (("after", after), ("before", before)):
        again = models(tmp_path, every=10, keep=2, best="score")
        again.resume_from(state, own.folder)
        states[name] = (again.best_path.name, why_withdrawn(tmp_path, "step-00000020-sma"), note(tmp_path)["folder"])
        assert again.state() == state
    assert states["before"] == ("step-00000020-sma", None, "step-00000020-sma")
    assert states["after"] == ("step-00000010-sma", "a spike", "step-00000010-sma")
