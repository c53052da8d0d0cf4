"""The ablations: which merges are measured, what a rule loses, and a page that says what the records say."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.ablations import further, page, records, rules, training
from benchmarks.ablations.claims import claims
from benchmarks.ablations.gains import gain
from benchmarks.ablations.merges import FURTHER, LIMIT, NESTED, WINDOW, Merge, Plan
from benchmarks.ablations.records import Result, Row
from benchmarks.ablations.setups import RUNS, SEEDS, STAGES, Run
from pretrain_merge.demo.corpus import Corpus
from pretrain_merge.demo.models import build_model

UNIT = 24


def merges_of(plan, units):
    return plan[units * UNIT]


def test_every_cell_is_trained_with_every_seed():
    cells = {run.cell for run in RUNS}
    assert {(run.cell, run.seed) for run in RUNS} == {(cell, seed) for cell in cells for seed in SEEDS}
    assert len({run.name for run in RUNS}) == len(RUNS)
    assert all(run.unit % 8 == 0 and run.warmup_steps == run.unit for run in RUNS)


def test_a_merge_reaches_back_over_constant_rate_only_and_never_ahead():
    for step, merges in Plan(UNIT).constant().items():
        assert merges[0].kind == "raw"
        for merge in merges:
            assert UNIT <= merge.steps[0] <= merge.steps[-1] == step
            assert len(set(merge.steps)) == len(merge.weights) == len(merge.steps)
            assert math.fsum(merge.weights) == pytest.approx(1.0)


def test_the_paper_s_windows_are_where_it_has_them():
    early = merges_of(Plan(UNIT).constant(), 6)
    by_interval = {merge.every: merge for merge in early if merge.kind == "sma" and merge.asked == WINDOW}
    # V = 16B reaches back over 144 of 204 billion tokens, V = 32B to the warm-up
    assert by_interval[UNIT // 2].steps[0] / UNIT == pytest.approx(6 - 9 / 2)
    assert (by_interval[UNIT].used, by_interval[UNIT].steps[0]) == (6, UNIT)


def test_a_mean_of_block_means_is_a_mean_of_their_samples():
    blocks = [merge for merge in merges_of(Plan(48).constant(), 100) if merge.kind == "block"]
    assert {merge.every for merge in blocks} == {12, 48}
    for merge in blocks:
        assert merge.steps == tuple(range(2400 - WINDOW * merge.every + 3, 2401, 3))  # ((k-1)V, kV], every third step


def test_a_window_that_limits_itself_spans_at_most_its_share_unless_it_is_of_two():
    plan = Plan(UNIT)
    for step in range(2 * UNIT, 50 * UNIT, UNIT):
        for every in (3, 6, 12, 24):
            number = plan.limited(step, every)
            assert number == 2 or (number - 1) * every <= LIMIT * (step - UNIT)
            assert number == WINDOW or number * every > LIMIT * (step - UNIT)  # and one more would be too many


def test_nested_spans_are_the_newest_of_the_snapshots_that_the_product_takes():
    nested = [merge for merge in Plan(UNIT).constant()[1195] if merge.every == 0 and merge.kind == "sma"]
    assert [merge.asked for merge in nested] == list(NESTED)
    for shorter, longer in pairwise(nested):
        assert longer.steps[-shorter.used :] == shorter.steps
    ten = next(merge for merge in nested if merge.asked == 10)
    assert 0.08 < (ten.steps[-1] - ten.steps[0]) / ten.steps[-1] < 0.09


# a loss that is lowest at a tenth of the steps, as a parabola in the logarithm; raw breaks even where it is 4% above


def planted(cell="dense", best=0.1, noise=0.0):
    draws = np.random.default_rng(3)

    def loss(span, step):
        return 2.0 + 0.02 * math.log(max(span / step, 0.004) / best) ** 2

    def rows(step, merges):
        found = []
        for merge in merges:
            span = merge.steps[-1] - merge.steps[0]
            value = 2.08 if merge.kind == "raw" else loss(span, step)
            found.append(Row(*merge[:4], span, *(value + noise * draws.normal(size=2))))
        return found

    constant = {step: rows(step, merges) for step, merges in Plan(UNIT).constant().items()}
    decay = {step: rows(step, merges) for step, merges in Plan(UNIT).decay().items()}
    return Result("planted", {"cell": cell, "num_steps": 50 * UNIT}, 1000, constant, decay)


def test_the_best_span_and_the_break_even_are_found_where_they_were_planted():
    for units in (19, 50):
        assert rules.best_share(planted(), units) == pytest.approx(0.1, rel=0.02)
        assert rules.best_share(planted(best=0.05), units) == pytest.approx(0.05, rel=0.02)
        # ln(x / .1)^2 = 4, between two measured spans
        assert rules.break_even(planted(best=0.05), units) == pytest.approx(0.05 * math.exp(2), rel=0.05)
    assert math.isnan(rules.break_even(planted(), 50))  # at 74%, longer than measured


def test_a_rule_loses_what_its_span_costs():
    result = planted()
    found = {row["rule"]: row for row in rules.table(rules.regrets([result], rules.CHOICES))}
    assert found["the best of the nested means, seen on both halves"]["max"] == 0.0
    assert found["parabola through nested means of 2 to 90"]["max"] < 0.01  # the nearest measured span
    # ten snapshots span 8.4%; the nearest measured span is 10.2% or the like
    assert 0 < found["every: 1%, N = 10"]["mean"] < 0.1
    assert found["raw"]["mean"] == pytest.approx(4.0, abs=0.01)
    assert min(row["mean"] for row in found.values()) >= 0.0


def test_a_rule_is_judged_on_the_half_that_it_did_not_look_at():
    result = planted(noise=0.01)
    rows = {row["rule"]: row for row in rules.table(rules.regrets([result], rules.CHOICES))}
    looks, sees = (rows[name]["mean"] for name in rules.CHOICES if "nested means" in name)
    assert looks > sees > 0.0  # it follows the noise of one half, and pays on the other


@pytest.mark.parametrize(("judging", "expected"), [(1.98, -1.0), (2.02, 0.5)])
def test_a_step_is_chosen_on_one_half_and_judged_on_the_other(judging, expected):
    result = planted()

    def moved(row):
        is_it = row.kind == "extrapolated 0.2"
        at_0 = row._replace(choosing=2.0, judging=2.0) if row.kind.startswith("extrapolated") else row
        return at_0._replace(choosing=1.98, judging=judging) if is_it else at_0

    moved_rows = {step: [moved(row) for row in rows] for step, rows in result.constant.items()}
    found = further.gains([dataclasses.replace(result, constant=moved_rows)])
    percents = {gain.percent for gain in found if gain.way == further.CHOSEN}
    # where the halves disagree, one choice is paid for on the other half, and the other choice stays at 0
    assert list(percents) == [pytest.approx(expected)]


def test_a_run_that_was_measured_before_there_were_steps_says_nothing_of_them():
    before = {step: [row for row in rows if row.kind not in FURTHER] for step, rows in planted().constant.items()}
    assert further.gains([dataclasses.replace(planted(), constant=before)]) == []


def test_a_verdict_follows_from_the_runs():
    helps = planted()
    first = claims([helps, planted("moe")])[0]
    assert first.verdict.startswith("**holds** (2 of 2 runs)")
    hurts = {
        step: [row._replace(choosing=1.0, judging=1.0) if row.kind == "raw" else row for row in rows]
        for step, rows in helps.constant.items()
    }
    worse = [dataclasses.replace(helps, constant=hurts), dataclasses.replace(planted("moe"), constant=hurts)]
    assert claims(worse)[0].verdict.startswith("**does not hold** (0 of 2 runs)")
    assert gain(worse[0], 50, "sma", 4) > 0


def test_what_is_written_is_read_back(tmp_path):
    run = RUNS[0]
    rows = {144: [["raw", 0, 1, 1, 0, 2.12345678, 2.0]]}
    result = {"parameters": 7, "constant": rows, "decay": {}, "routing": {143: {}}, "seconds": {"train": 1.23}}
    records.write(tmp_path / "dense-0.json", run.describe(), result, {"machine": "this"})
    (read,) = records.read_all(tmp_path)
    assert read.constant == {144: [Row("raw", 0, 1, 1, 0, 2.123457, 2.0)]}
    assert (read.setup["cell"], read.decay, read.routing, read.parameters) == ("dense", {}, {}, 7)
    assert list(tmp_path.iterdir()) == [tmp_path / "dense-0.json"]


def test_the_page_says_what_the_records_say():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, records.read_all()) == text, "run: python -m benchmarks.ablations --report"
    for name in page.TABLES:
        assert f"<!-- records: {name} -->" in text


def test_a_table_that_drifted_is_found():
    text = page.PAGE.read_text(encoding="utf-8")
    drifted = text.replace("**holds**", "**is true**", 1)
    assert page.written(drifted, records.read_all()) != drifted


def test_a_run_measures_the_mean_of_the_models_that_it_went_through(monkeypatch):
    text = torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    corpus = Corpus(text[:3000], text[3000:], 2)
    run = Run(
        name="tiny", cell="tiny", num_steps=50, warmup_steps=1, batch_size=2, block_length=16, num_validation_blocks=8
    )
    merges = [
        Merge("raw", 0, 1, 1, (50,), (1.0,)),
        Merge("sma", 10, 2, 2, (40, 50), (0.5, 0.5)),
        Merge("raw", 0, 1, 1, (40,), (1.0,)),
    ]

    class Few(Plan):
        def constant(self):
            return {50: merges}

        def decay(self):
            return {}

    seen = {}
    monkeypatch.setattr(training, "Plan", Few)
    monkeypatch.setattr(
        training,
        "_measure",
        lambda scale, models, found: (
            seen.update(scale=scale, models=models) or [[merge.kind, *scale.losses(models, merge)] for merge in found]
        ),
    )
    result = training.train(run, corpus, lambda _: None)
    models = {step: vector.double() for step, vector in seen["models"].items()}
    assert models.keys() == {40, 50}
    mean = (models[40] + models[50]) / 2
    model = build_model("llama", seed=0).double()
    torch.nn.utils.vector_to_parameters(mean, model.parameters())
    with torch.no_grad():
        expected = [float(model(input_ids=ids, labels=ids).loss) for ids in seen["scale"].halves]
    assert result["constant"][50][1][1:] == pytest.approx(expected, rel=1e-5)
    assert result["constant"][50][0] != result["constant"][50][2]


def test_stages_are_the_paper_s_shares_of_the_training():
    tokens = [float(tokens.removesuffix("B")) for tokens in STAGES.values()]
    for units, billions in zip(STAGES, tokens, strict=True):
        assert units / 50 == pytest.approx(billions / 1607, abs=0.01)
