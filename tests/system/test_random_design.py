"""The suite by random design: its factors, its order, and its means against their definition."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.annealing import random_runs, records
from benchmarks.annealing.decoder import Decoder
from benchmarks.annealing.design import draws
from benchmarks.annealing.random_runs import spans_by_step, train
from pretrain_merge.demo.corpus import Corpus

FACTORS = ("optimizer", "text", "family", "weight_decay")


@pytest.fixture(scope="module")
def drawn():
    """The whole design: seconds of sorting by what each run costs, and not those of every process that collects."""
    return draws()


def test_a_run_is_the_same_run_however_many_are_drawn(drawn):
    assert draws(8) == drawn[:8]
    assert len({run.name for run in drawn}) == len(drawn) == 48


@pytest.mark.parametrize("first", [8, 16, 32, 48])
def test_what_is_done_after_any_block_is_a_random_design(drawn, first):
    done = drawn[:first]
    places = np.sort(np.log([run.num_steps for run in done]))
    even = np.log(400) + (np.arange(first) + 0.5) / first * np.log(25)
    assert np.abs(places - even).max() < 2 * np.log(25) / first
    for factor in FACTORS:
        counts = Counter(getattr(run, factor) for run in done)
        assert len(counts) > 1
        assert max(counts.values()) <= 0.8 * first


def test_the_factors_do_not_go_together(drawn):
    """But for the size, which is what is affordable at the length."""
    columns = {
        "length": [np.log(run.num_steps) for run in drawn],
        "lr": [np.log(run.peak_lr) for run in drawn],
        "moe": [run.family == "moe" for run in drawn],
        "decay": [run.weight_decay > 0 for run in drawn],
        "dropout": [run.dropout > 0 for run in drawn],
        "epochs": [run.epochs > 0 for run in drawn],
    }
    correlations = np.corrcoef([np.array(column, dtype=np.float64) for column in columns.values()])
    assert np.abs(correlations - np.eye(len(columns))).max() < 0.45


def test_anneals_are_log_uniform_in_steps_and_lie_within_the_run(drawn):
    for run in drawn:
        for branch in run.branches:
            assert run.warmup_steps < branch.start
            assert 20 <= branch.steps <= 0.3 * (branch.start + branch.steps) + 1
        assert {branch.start + branch.steps for branch in run.branches} == {
            run.num_steps // share for share in (4, 2, 1)
        }
        assert sum(branch.order for branch in run.branches) == 1


def test_a_run_is_trained_evaluated_written_and_read_again(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(random_runs, "VALIDATION_BLOCKS", 4)
    text = torch.randint(0, 64, (20_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run = replace(drawn[0], num_steps=200, warmup_steps=10, width=16, depth=1, batch_size=1, dropout=0.1)
    result = train(run, Corpus(text, text, 1), None, lambda said: None)
    records.write_random_run(tmp_path / "run.json", run.describe(), result, {})
    again = records.read_run(tmp_path / "run.json")
    points = again.records[records.EVERY]
    assert [record.step for record in points] == list(spans_by_step(run))
    for record, spans in zip(points, spans_by_step(run).values(), strict=True):
        assert [records_span(recipe) for recipe in record.recipes.values()] == spans
    assert len(again.anneals) == len(run.branches)
    assert all(np.isfinite(anneal["loss"]) for anneal in again.anneals)


def records_span(recipe):
    first, *_, last = recipe.steps
    return (last - first) * len(recipe.steps) // (len(recipe.steps) - 1)


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_a_byte_is_predicted_from_those_before_it_alone(family):
    torch.manual_seed(0)
    model = Decoder(width=16, depth=1, block_length=8, family=family, dropout=0.5).eval()
    block = torch.randint(0, 256, (1, 8))
    gradient = torch.autograd.grad(model(block), model.embed_positions.weight)[0]
    assert torch.all(gradient[-1] == 0)  # the last byte predicts nothing
    assert torch.all(gradient[:-1].abs().sum(dim=1) > 0)
