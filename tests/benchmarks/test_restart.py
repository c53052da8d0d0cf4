"""The restarts: the control is the run itself, a merge is a mean, and a page that says what the records say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.collapse import Collapse
from benchmarks.restart import page, questions, records
from benchmarks.restart.gains import Survival, at, gain, of_question
from benchmarks.restart.loop import Training, batches, follow, merged, with_fresh_optimizer
from benchmarks.restart.records import Arm, Result
from benchmarks.restart.setups import DEEPER, Setup, trunk_of
from pretrain_merge.demo.corpus import Corpus

SETUP = Setup(seed=0, num_steps=12, every=3, width=16, depth=1, batch_size=2, warmup_steps=1)


@pytest.fixture(scope="module")
def corpus():
    text = torch.randint(0, 256, (30_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Corpus(text[:15_000], text[15_000:], 2)


@pytest.fixture(scope="module")
def states(corpus):
    training, text = Training(SETUP), batches(corpus, SETUP)
    found = []
    for step in range(1, SETUP.num_steps + 1):
        training.step(text(step), lr=SETUP.lr, clip=SETUP.clip)
        found.append(training.state(step))
    return found


def followed(corpus, start, num_steps, **options):
    validation = corpus.validation[:1280].view(-1, 64).long()
    arguments = {"first": start.step + 1, "num_steps": num_steps, "validation": validation, "clip": SETUP.clip}
    text = batches(corpus, SETUP)
    return follow(Training(SETUP), start, lambda done: SETUP.lr, text, **arguments, measured={0, num_steps}, **options)


def test_the_control_of_a_restart_is_the_run_itself_bit_for_bit(corpus, states):
    restarted = followed(corpus, states[5], 6)
    assert restarted.losses[6] == followed(corpus, states[11], 0 + 1).losses[0]
    assert len(restarted.norms) == 6
    assert followed(corpus, with_fresh_optimizer(states[5]), 6).losses[6] != restarted.losses[6]


def test_a_merge_is_the_mean_of_weights_and_on_request_of_moments(states):
    window = states[2::3]
    averaged, newest, fresh = (merged(window, kind) for kind in ("average", "newest", "fresh"))
    for name, value in averaged.model.items():
        oracle = np.mean([state.model[name].double().numpy() for state in window], axis=0)
        np.testing.assert_allclose(value.numpy(), oracle.astype(np.float32), rtol=2**-23)
    moments = [state.optimizer["state"][0]["exp_avg"].double().numpy() for state in window]
    np.testing.assert_allclose(
        averaged.optimizer["state"][0]["exp_avg"].numpy(), np.mean(moments, axis=0).astype(np.float32), rtol=2**-23
    )
    assert averaged.optimizer["state"][0]["step"] == window[-1].optimizer["state"][0]["step"]
    assert torch.equal(newest.optimizer["state"][0]["exp_avg"], window[-1].optimizer["state"][0]["exp_avg"])
    assert fresh.optimizer is None


@pytest.mark.parametrize("worst", [4.0, math.nan])
def test_a_collapse_is_seen_and_where_it_began(worst):
    collapse = Collapse()
    seen = [step for step in range(1, 61) if collapse.sees(step, 2.0 if step <= 40 else worst)]
    assert 41 <= seen[0] <= 44
    assert 40 <= collapse.sound_until < seen[0]


def test_noise_of_batches_is_not_a_collapse():
    generator = np.random.default_rng(0)
    collapse = Collapse()
    assert not any(collapse.sees(step, 2.5 + 0.2 * generator.standard_normal()) for step in range(1, 1000))


def test_a_restart_that_collapses_ends_there(corpus, states):
    collapse = Collapse(lowest=0.0)  # every loss is far above it
    dead = followed(corpus, states[0], 11, collapse=collapse)
    assert (dead.died, math.isnan(dead.tail)) == (10, True)
    assert list(dead.losses) == [0]


def test_a_deeper_rewind_reaches_far_enough_back_for_every_trunk():
    for name in questions.QUESTIONS:
        setup = trunk_of(name, 0)
        kept = questions.kept_snapshots(setup)
        assert (kept - 1) * setup.every >= DEEPER + (questions.WINDOW - 1) * setup.every


def test_every_question_has_the_arms_that_the_page_asks_for(corpus, monkeypatch):
    monkeypatch.setattr(questions, "corpus", lambda name: corpus)
    monkeypatch.setattr(questions, "validation_blocks", lambda texts: corpus.validation[:640].view(-1, 64).long())
    monkeypatch.setattr(questions, "Collapse", Planted)
    questions.trunk.cache_clear()  # of the same setup with the real text
    setup = replace(SETUP, num_steps=120, every=10, warmup_steps=2)
    results = []
    for name, question in questions.QUESTIONS.items():
        followed = question(setup, 2).items()
        results.append(Result(name, 0, {}, {arm: Arm({0: 1.0, 500: 1.0}, tail=found.tail) for arm, found in followed}))
    questions.trunk.cache_clear()
    rows = {name: page.TABLES[name](results).splitlines()[2:] for name in ("constant", "shock", "divergence")}
    assert [len(found) for found in rows.values()] == [8, 8, 10]
    assert all("+0.00%" in row for row in rows["constant"] + rows["shock"])
    names = results[0].arms.keys() | results[4].arms.keys()
    assert {"merge, average, 150 steps", "raw deeper, newest, 500 steps", "annealed, full", "raw, short"} <= names


class Planted(Collapse):
    """Sees one in a trunk, where it has seen more than a restart's few steps."""

    def sees(self, step, loss):
        self.sound_until = 110
        return step == 115


def test_gains_are_paired_over_the_seeds_that_have_both():
    arms = [{"merge": Arm({0: 1.98}), "raw": Arm({0: 2.0})}, {"merge": Arm({0: 2.97}), "raw": Arm({0: 3.0})}]
    results = [Result("constant", seed, {}, found) for seed, found in enumerate([*arms, {"raw": Arm({0: 9.0})}, {}])]
    spread = gain(of_question(results, "constant"), "merge", "raw", at(0))
    assert (spread.mean, spread.num) == (pytest.approx(-1.0), 2)
    assert gain(results, "merge", "raw", at(500)) is None
    lives = [Result("divergence", seed, {}, {"raw": Arm({}, died=died)}) for seed, died in enumerate([None, 40])]
    assert Survival.of(lives, "raw") == Survival(1, 2, [40])


def test_what_is_written_is_read_back(tmp_path):
    arms = {"raw, newest": Arm({0: 2.123456, 500: 2.0}, {0: 3.0}, (1.2345, 2.0), 1.99), "dead": Arm({0: 2.0}, died=7)}
    records.write(tmp_path / "shock-3.json", Result("shock", 3, SETUP.describe(), arms), {"machine": "this"})
    (read,) = records.read_all(tmp_path)
    assert (read.question, read.seed, read.setup["width"]) == ("shock", 3, 16)
    assert read.arms["raw, newest"] == Arm({0: 2.12346, 500: 2.0}, {0: 3.0}, (1.23, 2.0), 1.99)
    assert read.arms["dead"] == arms["dead"]
    assert list(tmp_path.iterdir()) == [tmp_path / "shock-3.json"]


def test_the_page_says_what_the_records_say():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, records.read_all()) == text, "run: python -m benchmarks.restart --report"
    for name in page.TABLES:
        assert f"<!-- records: {name} -->" in text


def test_a_verdict_needs_more_than_chance():
    planted = [Result("continued", seed, {}, _starts(2.0 + 0.001 * seed)) for seed in range(5)]
    assert "| **holds** |" in page.TABLES["claims"](planted)
    few = page.TABLES["claims"](planted[:1])
    assert "**holds**" not in few


def _starts(merge):
    curve = {0: merge, 100: merge, 500: merge}
    raw = dict.fromkeys(curve, 2.1)
    names = [
        (f"{name}, {schedule}", losses)
        for name, losses in (("merge", curve), ("raw", raw))
        for schedule in ("full", "short")
    ]
    return {name: Arm(losses, norms=(1.0, 1.1) * 25) for name, losses in names}
