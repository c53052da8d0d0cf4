"""Counting: a step is a batch in which an optimizer stepped; tokens and samples wait for it."""

from typing import Any

import pytest
import torch
from harness.models import LIGHTNING_REMARKS, Regression, TiedModel, TwoOptimizers, documents, rows, trainer

from pretrain_merge import ModelMerging
from pretrain_merge.cadence import Cadence, Progress, Quantity
from pretrain_merge.callbacks.clock import Clock
from pretrain_merge.errors import ProgressError
from pretrain_merge.records import read_records

pytestmark = LIGHTNING_REMARKS

BATCH = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "text": ["a", "b"]}


def clock(every: str = "10 tokens", tokens_per_batch: Any = "input_ids", start: Progress = Progress()) -> Clock:  # noqa: B008
    return Clock([Cadence(Quantity.parse(every))], tokens_per_batch, start)


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def counted(clock: Clock, batches: list[Any]) -> list[Progress | None]:
    """What the clock says after each batch, an optimizer having stepped in each."""
    said = []
    for batch in batches:
        clock.optimizer_steps(0, optimizer(0.1))
        said.append(clock.batch_ends(batch))
    return said


@pytest.mark.parametrize(
    ("source", "tokens"),
    [("input_ids", 16), (7, 7), (lambda batch: batch["input_ids"].shape[1], 8), (lambda batch: torch.tensor(3), 3)],
)
def test_tokens_come_from_a_key_a_number_or_a_function(source, tokens):
    assert counted(clock(tokens_per_batch=source), [BATCH, BATCH]) == [
        Progress(1, 2, tokens),
        Progress(2, 4, 2 * tokens),
    ]


@pytest.mark.parametrize(
    ("source", "batch", "said"),
    [
        ("labels", BATCH, "KeyError"),
        ("input_ids", [torch.zeros(2)], "TypeError"),
        ("text", BATCH, "AttributeError"),
        (lambda batch: 1 / 0, BATCH, "ZeroDivisionError"),
    ],
)
def test_a_token_cadence_without_a_source_is_an_error_at_the_first_batch(source, batch, said):
    with pytest.raises(ProgressError) as error:
        counted(clock(tokens_per_batch=source), [batch])
    for piece in ("counts tokens", type(batch).__name__, said, "Set tokens_per_batch to a number", "count in steps"):
        assert piece in str(error.value)


def test_a_batch_of_no_tokens_is_an_error_where_tokens_count():
    with pytest.raises(ProgressError, match="this batch has 0"):
        counted(clock(tokens_per_batch=lambda batch: 0), [BATCH])


@pytest.mark.parametrize("batch", [None, {}, 3.0], ids=repr)
def test_a_sample_cadence_without_samples_is_an_error(batch):
    with pytest.raises(ProgressError, match="counts samples"):
        counted(clock("4 samples"), [batch])


def test_a_step_cadence_asks_for_nothing():
    assert counted(clock("1 steps", tokens_per_batch="labels"), [object()]) == [Progress(1, 0, 0)]


def test_tokens_of_batches_between_optimizer_steps_wait_for_the_step():
    own = clock()
    assert [own.batch_ends(BATCH), own.batch_ends(BATCH)] == [None, None]
    assert own.progress == Progress()
    own.optimizer_steps(0, optimizer(0.1))
    assert own.batch_ends(BATCH) == own.progress == Progress(1, 6, 48)


def test_several_optimizers_in_one_batch_are_one_step():
    own = clock("1 steps")
    own.optimizer_steps(0, optimizer(0.1))
    own.optimizer_steps(1, optimizer(0.2))
    own.optimizer_steps(0, optimizer(0.1))
    assert own.batch_ends(BATCH) == Progress(1, 2, 16)


def test_the_rate_is_that_of_the_last_step_of_each_optimizer():
    own = clock("1 steps")
    own.optimizer_steps(1, optimizer(0.2, 0.3))
    own.optimizer_steps(0, optimizer(0.1))
    assert own.lr == (0.1, 0.2, 0.3)
    own.optimizer_steps(1, optimizer(0.4, 0.3))
    assert own.lr == (0.1, 0.4, 0.3)


def test_a_clock_goes_on_from_where_a_run_was():
    assert counted(clock(start=Progress(5, 50, 500)), [BATCH]) == [Progress(6, 52, 516)]


def test_ranks_that_read_the_same_batch_count_it_once():
    own = Clock([Cadence(Quantity.parse("10 tokens"))], "input_ids", Progress(), share=0.5)
    own.optimizer_steps(0, optimizer(0.1))
    assert own.batch_ends(BATCH) == Progress(1, 1, 8)


def test_a_step_cadence_sums_over_ranks_only_where_a_snapshot_is_due(monkeypatch):
    sums: list[list[int]] = []
    monkeypatch.setattr("pretrain_merge.runtime.ranks.sum_over_ranks", lambda counts: sums.append(counts) or counts)
    assert counted(clock("3 steps"), [BATCH] * 4) == [Progress(1), Progress(2), Progress(3, 6, 48), Progress(4, 6, 48)]
    assert sums == [[6, 48, 0]]  # and no rank failed to count


def test_what_is_not_summed_yet_is_handed_to_the_next_clock():
    first = clock("3 steps")
    counted(first, [BATCH] * 4)
    second = Clock([Cadence(Quantity.parse("3 steps"))], "input_ids", first.progress, first.pending)
    assert counted(second, [BATCH] * 2)[-1] == Progress(6, 12, 96)


def steps_of_merges(folder: Any, module: Any, train: Any, options: dict[str, Any], **merging: Any) -> list[Any]:
    callback = ModelMerging(window=3, validate=False, **merging)
    trainer(folder, callback, **({"max_epochs": 1} | options)).fit(module, train)
    return [(record.step, record.samples, record.tokens) for record in read_records(folder / "merges.jsonl")]


@pytest.mark.parametrize("source", ["input_ids", 24, lambda batch: batch["input_ids"].numel()])
def test_snapshots_by_tokens_fall_on_the_step_that_crosses(source, tmp_path):
    # 24 tokens a step; 50, 100 and 150 tokens are crossed by steps 3, 5 and 7
    merges = steps_of_merges(tmp_path, TiedModel(), documents(32), {}, every="50 tokens", tokens_per_batch=source)
    assert merges == [(5, 20, 120), (7, 28, 168)]


def test_p01_under_accumulation_a_crossed_count_waits_for_the_optimizer_step(tmp_path):
    # 24 tokens a batch and three batches a step: 72, 144, 192 (the epoch's last two batches)
    merges = steps_of_merges(tmp_path, TiedModel(), documents(32), {"accumulate_grad_batches": 3}, every="50 tokens")
    assert merges == [(2, 24, 144), (3, 32, 192)]


def test_samples_are_counted_for_plain_batches(tmp_path):
    assert steps_of_merges(tmp_path, Regression(), rows(22), {}, every="8 samples") == [(4, 16, 0)]


def test_p01_two_optimizers_in_a_batch_are_one_step_of_ours_and_two_of_lightnings(tmp_path):
    callback = ModelMerging(window=3, every=2, validate=False)
    own = trainer(tmp_path, callback, max_epochs=1)
    own.fit(TwoOptimizers(), rows(24))
    assert own.global_step == 12
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 6]
    assert callback.last_record.lr == (0.02, 0.05)


def test_a_token_cadence_without_tokens_stops_the_run_at_its_first_batch(tmp_path):
    own = trainer(tmp_path, ModelMerging(window=3, every="50 tokens"), max_epochs=1)
    with pytest.raises(ProgressError, match="a batch of type list does not tell how many"):
        own.fit(Regression(), rows())
    assert own.global_step == 1


def test_p28_the_rate_of_a_record_is_the_one_that_its_step_used(tmp_path):
    class Halving(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    callback = ModelMerging(window=3, every=1, breaks={"lr": False}, validate=False)
    trainer(tmp_path, callback, max_steps=4).fit(Halving(lr=1.0), rows())
    rates = [record.lr for record in read_records(tmp_path / "merges.jsonl")]
    assert rates == [(0.5,), (0.25,), (0.125,)]  # of steps 2, 3 and 4: schedulers have moved on when we look
