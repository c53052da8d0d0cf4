"""`auto`: the span that nested means said was best at the merge point before, the same in a resumed run."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from harness.models import LIGHTNING_REMARKS, rows, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pretrain_merge import ModelMerging
from pretrain_merge.cadence import Progress
from pretrain_merge.callbacks.auto_spans import AutoSpans
from pretrain_merge.config import parse_settings
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import MergeRecord, Recipe, read_records

pytestmark = LIGHTNING_REMARKS

BY_PROBE = {"name": "auto", "kind": "auto", "metric": "probe/loss"}


class Counting(pl.LightningModule):
    """Its weight is the number of steps, so that a mean tells its span: twice its distance from the newest."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def probe(module, best=0.2):
    """A loss that is least for a mean over a fifth, or another share, of the steps so far."""
    step = module.trainer.global_step
    span = 2 * (step - module.weight.item())
    return {"loss": 2.0 + math.log(span / (best * step)) ** 2 if span else 9.0}


def merged(folder, views=(BY_PROBE, "sma"), best=0.2, **options):
    """A run's records."""
    evaluators = {"probe": partial(probe, best=best)}
    forecast = "auto" if BY_PROBE in views else None
    merging = ModelMerging(
        window=41, every=1, views=list(views), evaluators=evaluators, merge_every=10, forecast=forecast
    )
    keeps = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_train_steps=10**6)
    ckpt_path = options.pop("ckpt_path", None)
    own = trainer(folder, merging, keeps, enable_checkpointing=True, **options)
    own.fit(Counting(), rows(400), ckpt_path=ckpt_path)
    own.save_checkpoint(folder / "end.ckpt")
    return {record.step: record for record in read_records(folder / "merges.jsonl")}


def test_the_span_is_that_which_was_best_at_the_merge_point_before_and_a_resumed_run_goes_on_with_it(tmp_path):
    whole = merged(tmp_path / "whole", max_steps=120)
    for step in range(70, 121, 10):
        record = whole[step]
        assert record.choices["auto"].span == pytest.approx(0.2 * step, rel=0.02)
        assert record.metrics()["merge/auto/span"] == pytest.approx(0.2 * step, abs=1.0)
        expected = probe_of(max(40.0, 0.2 * step), step) / 2.0 - 1.0
        assert record.choices["auto"].regret == pytest.approx(expected, abs=2e-3)
    merged(tmp_path / "halves", max_steps=75)
    halves = merged(tmp_path / "halves", max_steps=120, ckpt_path=tmp_path / "halves/end.ckpt")
    assert {step: record.recipes for step, record in halves.items()} == {
        step: record.recipes for step, record in whole.items()
    }


def probe_of(span, step):
    return 2.0 + math.log(span / (0.2 * step)) ** 2


def record(step, losses, since=0):
    """A merge point with nested means of a window of ten, every ten steps."""
    recipes = {
        f"forecast/sma{number}": Recipe(tuple(range(step - 10 * (number - 1), step + 1, 10)), (1 / number,) * number)
        for number in losses
    }
    views = {f"forecast/sma{number}": {"val/loss": loss} for number, loss in losses.items()}
    return MergeRecord("merge", step, 0, 0, 10, 0.1, {"val/loss": 3.0}, views, recipes, since=since)


def test_a_choice_holds_for_its_stretch_only_and_the_run_ends_with_advice():
    spans = AutoSpans(parse_settings({"window": 10, "every": 10, "views": ["auto"]}))
    assert spans.shares(Progress()) == {}
    for step in range(200, 700, 100):
        made = spans.with_choices(record(step, {2: 2.2, 3: 2.1, 5: 2.0, 10: 2.3}))
        assert MergeRecord.from_json(made.to_json()) == made
        assert 20 < made.choices["auto"].span < 90
    assert spans.shares(Progress()) == {"auto": made.choices["auto"].span / 600}
    assert spans.shares(Progress(step=600)) == {}  # a break
    assert "spans of 0.058 to 0.17 of the steps since the last break were best here" in spans.advice()


def test_where_nothing_was_measured_nothing_is_chosen_or_advised():
    spans = AutoSpans(parse_settings({"views": ["auto"]}))
    made = spans.with_choices(MergeRecord("merge", 100, 0, 0, 2, 0.1, {}, {}))
    assert (made.choices, spans.shares(Progress()), spans.advice()) == ({}, {}, None)


@pytest.mark.parametrize("given", [{"last": 4}, {"metric": 3}, {"alpha": 0.2}])
def test_what_a_view_that_chooses_its_span_is_not_given(given):
    with pytest.raises(ConfigError, match=r"^views\[0\]: view 'auto' chooses its span by itself\."):
        parse_settings({"views": [{"name": "auto", "kind": "auto", **given}]})


@pytest.mark.parametrize(("best", "low", "high"), [(0.01, 0.005, 0.015), (0.05, 0.04, 0.085), (0.5, 0.095, 0.121)])
def test_a_limit_that_nobody_gave_follows_what_is_best_up_to_what_is_ever_good(tmp_path, best, low, high):
    """The mean and its half are equal at the root of two times the best span, as the loss is a parabola in its log."""
    found = merged(tmp_path, views=["wma", "sma", "sma5"], best=best, max_steps=400)
    assert found[240].metrics()["merge/sma/span"] == 15  # a young stretch follows nothing, and measures no half
    assert "forecast/sma" not in found[240].views
    for step in range(380, 401, 10):
        assert low * step <= found[step].metrics()["merge/sma/span"] <= high * step + 1
        assert found[step].recipes["wma"].steps == found[step].recipes["sma"].steps
        assert len(found[step].recipes["sma5"].steps) == 5


def test_a_resumed_run_goes_on_with_the_limit_that_it_had(tmp_path):
    whole = merged(tmp_path / "whole", views=["sma"], max_steps=320)
    merged(tmp_path / "halves", views=["sma"], max_steps=285)
    halves = merged(tmp_path / "halves", views=["sma"], max_steps=320, ckpt_path=tmp_path / "halves/end.ckpt")
    assert {step: (item.recipes, item.choices) for step, item in halves.items()} == {
        step: (item.recipes, item.choices) for step, item in whole.items()
    }


def followed_by(**losses):
    """The share that follows a merge point at step 1,000 with a mean of 6%, one of its half, and raw."""
    spans, recipes = AutoSpans(parse_settings({"window": 10, "every": 20})), {}
    for view, number in {"sma": 4, "forecast/sma": 3 if "half" in losses else 4}.items():
        recipes[view] = Recipe(tuple(range(1000 - 20 * (number - 1), 1001, 20)), (1 / number,) * number)
    views = {"sma": {"loss": losses["sma"]}, "forecast/sma": {"loss": losses.get("half", losses["sma"])}}
    spans.with_choices(MergeRecord("merge", 1000, 0, 0, 10, 0.1, {"loss": losses["raw"]}, views, recipes))
    return spans.shares(Progress()).get("sma")


def test_a_mean_of_two_snapshots_is_held_against_raw_and_what_is_not_a_number_moves_nothing():
    assert followed_by(sma=2.0, half=2.1, raw=1.0) > 0.06 > followed_by(sma=2.0, half=1.9, raw=3.0)
    assert followed_by(sma=2.0, raw=2.1) > 0.06 > followed_by(sma=2.0, raw=1.9)
    assert followed_by(sma=2.0, half=math.nan, raw=3.0) is None


def test_a_limit_that_was_given_stays_and_costs_no_evaluation(tmp_path):
    merging = ModelMerging(window=41, every=1, span=0.2, evaluators={"probe": probe}, merge_every=50, forecast=None)
    trainer(tmp_path, merging, max_steps=200).fit(Counting(), rows(400))
    last = read_records(tmp_path / "merges.jsonl")[-1]
    assert (set(last.views), last.metrics()["merge/sma/span"], last.choices) == ({"sma"}, 40.0, {})
