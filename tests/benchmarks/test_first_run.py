"""A new user's first run: what is kept of it, and the verdict."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.first_run import runs, script
from benchmarks.first_run.runs import LINES, Run

DENSE, MOE = Run("dense", 1e-3, 0), Run("moe", 1e-3, 0)


def write(path, run, *gaps, view="sma", lines="readme"):
    points = {name: [] for name in LINES}
    points[lines] = [[step, 2.0, {view: [2.0 * (1 + gap), 100]}] for step, gap in gaps]
    runs.append(path, run, points, {})


def verdict(path, family="all"):
    return next(row for row in runs.verdicts(path) if row["family"] == family)


def test_the_verdict_counts_merges_past_the_first_quarter_and_looks_for_the_worst_past_the_first_tenth(tmp_path):
    path = tmp_path / "runs.jsonl"
    write(path, DENSE, (200, 0.5), (300, 0.004), (500, 0.1e-2), (501, -0.01), (2000, -0.02))
    found = verdict(path)
    assert (found["below"], found["merges"], found["share"]) == (2, 2, 1.0)
    assert found["above_at_worst"] == pytest.approx(0.004)
    assert found["at_end"] == pytest.approx(-0.02)
    assert found["holds"]


def test_one_merge_in_twenty_above_raw_is_too_many_and_so_is_one_far_above(tmp_path):
    often, far = tmp_path / "often.jsonl", tmp_path / "far.jsonl"
    write(often, DENSE, (600, 0.001), *((1000 + step, -0.01) for step in range(19)))
    assert not verdict(often)["holds"]
    write(far, DENSE, (300, 0.006), *((1000 + step, -0.01) for step in range(19)))
    assert not verdict(far)["holds"]


def test_models_are_judged_apart_and_together(tmp_path):
    path = tmp_path / "runs.jsonl"
    write(path, DENSE, (1000, -0.01))
    write(path, MOE, (1000, 0.01))
    assert [verdict(path, family)["share"] for family in ("dense", "moe", "all")] == [1.0, 0.0, 0.5]


def test_runs_that_are_kept_are_not_trained_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert runs.missing(path) == list(runs.RUNS)
    write(path, DENSE, (1000, -0.01))
    assert DENSE not in runs.missing(path)
    assert len(runs.missing(path)) == len(runs.RUNS) - 1 == 29


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_the_script_trains_and_every_set_of_lines_sees_it(family, monkeypatch):
    # narrower, on a batch of two: here the lines count, not the loss
    monkeypatch.setattr(script, "GPT", partial(script.GPT, width=8, depth=1))
    monkeypatch.setattr(script, "loaders", partial(script.loaders, batch_size=2))
    text = torch.randint(0, 256, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    points = runs.train(Run(family, 1e-3, 0), SimpleNamespace(train=text, validation=text[:9000]), steps=202)
    assert points["readme"]
    assert [step for step, _, _ in points["fixed"]] == [200]
    step, raw, views = points["readme"][-1]
    assert 100 < step <= 202
    assert raw > 0
    loss, span = views["sma"]
    assert 0 < loss < 10
    assert 0.05 < span / (step - 100) < 0.1
