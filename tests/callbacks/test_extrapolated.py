"""`extrapolated`: its step follows what merge points measured, and is none where nothing speaks for one."""

import numpy as np
import pytest
from callbacks.test_auto_spans import Counting
from harness.models import LIGHTNING_REMARKS, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.cadence import Progress
from pretrain_merge.callbacks.auto_spans import AutoSpans
from pretrain_merge.config import parse_settings
from pretrain_merge.errors import ConfigError
from pretrain_merge.offline.recipe import make_recipe
from pretrain_merge.offline.tensors import Source
from pretrain_merge.records import MergeRecord, Recipe, read_records

pytestmark = LIGHTNING_REMARKS

VIEW = {"name": "beyond", "kind": "extrapolated", "last": 20, "metric": "probe/loss"}
FURTHER = "forecast/further-beyond"


def merged(folder, best, max_steps, ckpt_path=None):
    """The records of a run whose weight is its step: of 20 snapshots, the newer half lies 4.5 steps back.

    The older half lies 10 steps further back, and the probe is least `best` of that way beyond the newer one.
    """

    def probe(module):
        beyond = module.weight.item() - (module.trainer.global_step - 4.5)
        return {"loss": 2.0 + (beyond / 10.0 - best) ** 2}

    merging = ModelMerging(window=20, every=1, views=[VIEW], evaluators={"probe": probe}, merge_every=10, forecast=None)
    keeps = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_train_steps=10**6)
    own = trainer(folder, merging, keeps, enable_checkpointing=True, max_steps=max_steps)
    own.fit(Counting(), rows(400), ckpt_path=ckpt_path)
    own.save_checkpoint(folder / "end.ckpt")
    return {record.step: record for record in read_records(folder / "merges.jsonl")}


def weights(step):
    """By the formula, in float64: what it does to each of 20 unit vectors."""
    older, newer = np.eye(20)[:10].mean(axis=0), np.eye(20)[10:].mean(axis=0)
    return newer + step * (newer - older)


def test_the_step_follows_what_was_better_and_a_resumed_run_goes_on_with_it(tmp_path):
    whole = merged(tmp_path / "whole", best=0.2, max_steps=80)
    went = {20: 0.0, 30: 0.1, 40: 0.2, 50: 0.1, 60: 0.2}  # the best is passed and met again
    for step, used in went.items():
        recipes, metrics = whole[step].recipes, whole[step].metrics()
        np.testing.assert_allclose(recipes["beyond"].coefficients, weights(used), rtol=0, atol=1e-12)
        np.testing.assert_allclose(recipes[FURTHER].coefficients, weights(used + 0.1), rtol=0, atol=1e-12)
        assert metrics["merge/beyond/probe/loss"] == pytest.approx(2.0 + (used - 0.2) ** 2, abs=1e-6)
        assert metrics["merge/beyond/best_step"] == whole[step].choices["beyond"].step
    assert [whole[step].choices["beyond"].step for step in went] == [0.1, 0.2, 0.1, 0.2, 0.1]
    assert whole[60].choices["beyond"].span == 19.0
    assert set(whole[60].shown) == {"beyond"}
    merged(tmp_path / "halves", best=0.2, max_steps=55)
    halves = merged(tmp_path / "halves", best=0.2, max_steps=80, ckpt_path=tmp_path / "halves/end.ckpt")
    assert {step: (item.recipes, item.choices) for step, item in halves.items()} == {
        step: (item.recipes, item.choices) for step, item in whole.items()
    }


def test_where_going_on_does_not_help_the_view_stays_a_plain_mean(tmp_path):
    records = merged(tmp_path, best=0.0, max_steps=50)
    for step in range(20, 51, 10):
        assert records[step].views["beyond"]["probe/loss"] <= 2.0 + 1e-6
        assert records[step].choices["beyond"].step == 0.0


def chosen(loss, beyond, ask=0):
    """What is told to the views after a merge point at step 1,000."""
    spans = AutoSpans(parse_settings({"window": 21, "every": "1%", "views": ["extrapolated"]}))
    views = {"extrapolated": {"val_loss": loss}, "forecast/further-extrapolated": {"val_loss": beyond}}
    recipes = {name: Recipe((900, 950, 975, 1000), (0.0, 0.0, 0.5, 0.5)) for name in views}
    made = spans.with_choices(MergeRecord("m", 1000, 0, 0, 21, 0.1, {"val_loss": 3.0}, views, recipes))
    assert MergeRecord.from_json(made.to_json()).choices == made.choices
    return spans.shares(Progress(step=ask))


def test_what_was_not_measured_and_what_is_of_another_stretch_speaks_against_going_on():
    assert chosen(2.0, 1.9) == {"extrapolated": 0.1, "forecast/further-extrapolated": 0.2}
    assert chosen(2.0, float("nan"))["extrapolated"] == 0.0
    assert chosen(2.0, 2.0)["extrapolated"] == 0.0
    assert chosen(2.0, 1.9, ask=600) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"window": 10, "every": "1%", "views": ["extrapolated"]},
            r'window 10 at every: "1%".*Set window: 21, every: "2%"',
        ),
        ({"window": 3, "every": 10, "views": ["extrapolated"]}, "has 3 snapshots for both. Allowed: 4 and more"),
        ({"views": ["extrapolated3"]}, "has 3 snapshots for both. Allowed: 4 and more"),
        ({"views": [{"name": "x", "kind": "extrapolated", "alpha": 0.2}]}, r"was given \['alpha'\]\. Allowed: `step`"),
        ({"views": [{"name": "x", "kind": "extrapolated", "span": "auto"}]}, "'auto' is a limit of means"),
        ({"views": [{"name": "x", "kind": "extrapolated", "step": -0.1}]}, "it must be at least 0"),
    ],
)
def test_a_line_without_two_means_is_refused_before_the_run(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(options)


def test_a_merge_of_files_measures_nothing_and_is_given_its_step():
    sources = [Source(f"{step}.pt", "torch", {}, lambda _: (), (), step=step) for step in (100, 200, 300, 400)]
    far = {"name": "far", "kind": "extrapolated", "step": 0.2}
    assert make_recipe(sources, far, None).coefficients == pytest.approx([-0.1, -0.1, 0.6, 0.6])
    for view in ("extrapolated", "auto"):
        with pytest.raises(ConfigError, match=rf"^view: '{view}' chooses by what a run measures"):
            make_recipe(sources, view, None)
