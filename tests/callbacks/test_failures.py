"""An evaluation that fails ends the run, unless the user wants it to go on without."""

from pathlib import Path
from typing import Any

import pytest
from harness.models import LIGHTNING_REMARKS, MemoryLogger, Regression, rows, same_bits, trainer, weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EarlyStopping

from pretrain_merge import ModelMerging, is_evaluating_merge
from pretrain_merge.callbacks.failures import Failures
from pretrain_merge.evaluation.users_code import users_code
from pretrain_merge.records import read_records
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce

pytestmark = LIGHTNING_REMARKS


class FailsOnMerged:
    """Gives a number for raw and raises for every merge but the last."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any) -> dict[str, float]:
        self.calls += 1
        if self.calls in (2, 4):
            raise ValueError("no such task")
        return {"x": 1.0}


class FailsAtMerges(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if is_evaluating_merge():
            raise RuntimeError("too large")


def fit(folder: Path, *callbacks: Any, module: Any = None, **options: Any) -> tuple[Any, Any]:
    module = module or Regression()
    merging = ModelMerging(**({"window": 2, "every": 2, "on_error": "warn", "forecast": {}} | options))
    own = trainer(folder, merging, *callbacks, max_steps=8, logger=MemoryLogger(folder))
    own.fit(module, rows(), rows(4, seed=1))
    return own, module


def test_a_failing_evaluator_takes_nothing_but_its_own_metrics_along(tmp_path, caplog):
    own, _ = fit(tmp_path, evaluators={"own": FailsOnMerged(), "other": lambda module: {"y": 2.0}})
    records = read_records(tmp_path / "merges.jsonl")
    assert [record.step for record in records] == [4, 6, 8]
    assert [sorted(record.views["sma"]) for record in records] == [
        ["other/y", "val_loss"],
        ["other/y", "val_loss"],
        ["other/y", "own/x", "val_loss"],
    ]
    assert all("own/x" in record.raw for record in records)
    assert [record.num_failed for record in records] == [1, 1, 0]
    assert records[0].skipped["evaluation/sma/own"].startswith("ValueError: no such task, in ")
    (said,) = [message for message in caplog.messages if "no such task" in message]
    assert "evaluator 'own' failed on 'sma'" in said
    logged = [values.get("merge/failed") for _, values in own.logger.lines if "merge/step" in values]
    assert logged == [1, 1, None]


def test_a_failing_evaluator_ends_the_run_unless_told_otherwise(tmp_path):
    with pytest.raises(ValueError, match="no such task"):
        fit(tmp_path, evaluators={"own": FailsOnMerged()}, on_error="raise")


def test_training_is_untouched_by_evaluations_that_fail(tmp_path):
    _, module = fit(tmp_path, module=FailsAtMerges())
    (first, *_) = read_records(tmp_path / "merges.jsonl")
    assert (first.raw, first.views) == ({}, {"sma": {}})
    seed_everything(0, verbose=False)
    plain = Regression()
    trainer(tmp_path, max_steps=8).fit(plain, rows(), rows(4, seed=1))
    assert same_bits(weights(module), weights(plain))


def test_a_best_model_is_looked_for_among_those_that_were_measured(tmp_path):
    fit(tmp_path, evaluators={"own": FailsOnMerged()}, save={"best": "own/x"})
    assert [path.name for path in (tmp_path / "merged").glob("step-*")] == ["step-00000008-sma"]


def test_whoever_waits_for_a_metric_that_failed_goes_on_waiting(tmp_path):
    stopping = EarlyStopping("merge/sma/own/x", patience=1)
    own, _ = fit(tmp_path, stopping, evaluators={"own": FailsOnMerged()})
    assert own.global_step == 8


def test_what_could_not_be_put_back_ends_the_run():
    failures = Failures("warn", WarnOnce())

    def broken(label: str) -> dict[str, float]:
        try:
            with users_code():
                raise ValueError("an evaluator")
        finally:
            raise OSError("a state that was not put back")

    with pytest.raises(OSError, match="not put back"):
        failures.measured(broken, "sma")


def test_one_rank_that_fails_counts_for_all(monkeypatch):
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "any_rank", lambda flag: True)
    monkeypatch.setattr(ranks, "gather", lambda reason: [reason, "ValueError: of the other"])
    failures = Failures("warn", WarnOnce())
    (evaluator,) = failures.guarded({"own": lambda module: {"x": 1.0}}, Regression()).values()
    assert failures.measured(lambda label: evaluator(None), "sma") == {}
    assert failures.reasons == {"evaluation/sma/own": "rank 1: ValueError: of the other"}
