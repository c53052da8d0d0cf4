"""Raw and merged see the same batches and random numbers, or it is an error; a signal ends all passes."""

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from evaluation.measuring import At, DrawsNumbers, measure_once, measured
from harness.models import LIGHTNING_REMARKS, Recorder, Regression, Rows, Witness, rows, same_bits, trainer, weights
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pretrain_merge import ModelMerging
from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import evaluate
from pretrain_merge.evaluation.loaders import EvaluationInterrupted
from pretrain_merge.runtime import ranks, signals

pytestmark = LIGHTNING_REMARKS


def test_raw_and_merged_see_the_same_random_numbers(tmp_path):
    def act(trainer: Any, module: Any) -> list[dict[str, float]]:
        with evaluate.isolated(trainer, module, evaluators={"own": lambda _: {"x": float(torch.rand(()))}}) as measure:
            return [measure(label) for label in ("raw", "sma", "wma")]

    at = At(2, act)
    trainer(tmp_path, at, max_steps=2).fit(DrawsNumbers(), rows(), rows(10, seed=1, shuffle=True))
    assert at.result[0] == at.result[1] == at.result[2]


class _OtherEachTime(Rows):
    """Different rows at each pass, by the clock of the data set itself."""

    def __init__(self) -> None:
        super().__init__(10, seed=1)
        self.reads = [0]
        self.queue = SimpleQueue()  # so that its clock is not put back

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads[0] += 1
        x, y = super().__getitem__(index)
        return x + self.reads[0], y


class _Shrinks(IterableDataset):
    def __init__(self) -> None:
        self.passes = [0]
        self.queue = SimpleQueue()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes[0] += 1
        source = Rows(12, seed=1)
        return (source[index] for index in range(12 - 4 * (self.passes[0] - 1)))


@pytest.mark.parametrize(
    ("data", "said"), [(_OtherEachTime, "batch 0 of this pass is another"), (_Shrinks, "2 batches after 3")]
)
def test_other_batches_at_the_second_pass_are_an_error_and_raw_is_back(data, said, tmp_path):
    module, raw = Regression(), Recorder()
    own = trainer(tmp_path, raw, ModelMerging(window=2, every=2), max_steps=6)
    with pytest.raises(EvaluationError, match=said) as error:
        own.fit(module, rows(), DataLoader(data(), 4))
    for piece in ("validation loader 0", "raw and merged", "same items at each iteration"):
        assert piece in str(error.value)
    assert own.global_step == 4
    assert same_bits(weights(module), raw.run.weights[-1])


class _Position(IterableDataset):
    """A stream that says where it is, as resumable data sets do."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = Rows(8, seed=1)
        return (source[index] for index in range(8))

    def state_dict(self) -> dict[str, int]:
        return {"position": 0}

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


def test_data_with_a_position_of_their_own_are_refused(tmp_path):
    with pytest.raises(EvaluationError) as error:
        measured(tmp_path, Regression(), DataLoader(_Position(), 4))
    for piece in ("validation loader 0", "_Position", "position of its own", "starts over", "stateful_data='iterate'"):
        assert piece in str(error.value)


def test_data_with_a_position_of_their_own_are_iterated_on_request(tmp_path):
    assert "val_loss" in measured(
        tmp_path, Regression(), DataLoader(_Position(), 4), isolated={"stateful_data": "iterate"}
    )


# the first two calls set up the loaders
@pytest.mark.parametrize("at_call", [4, 5, 8], ids=["before a batch", "between batches", "before a pass"])
def test_a_signal_on_any_rank_ends_the_measurement_on_all(at_call, tmp_path, monkeypatch):
    calls: list[list[int]] = []

    def with_another_rank(flags: list[int]) -> list[int]:
        calls.append(flags)
        return [*flags[:2], int(len(calls) == at_call), *flags[3:]]  # this rank has no signal

    def act(trainer: Any, module: Any) -> list[str]:
        done = []
        with pytest.raises(EvaluationInterrupted), evaluate.isolated(trainer, module) as measure:  # noqa: PT012
            for label in ("raw", "sma", "wma"):
                measure(label)
                done.append(label)
        return done

    monkeypatch.setattr(ranks, "_summed", with_another_rank)
    at = At(2, act)
    trainer(tmp_path, at, max_steps=2).fit(Regression(), rows(), rows(4 if at_call == 8 else 8, seed=1))
    assert len(calls) == at_call
    assert at.result == (["raw"] if at_call == 8 else [])


def test_a_waiting_signal_ends_the_pass_before_its_next_batch(tmp_path, monkeypatch):
    seen = Witness()

    class Signalled(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)
            monkeypatch.setattr(signals, "pending", lambda: True)

    def act(trainer: Any, module: Any) -> None:
        with pytest.raises(EvaluationInterrupted):
            measure_once(trainer, module)

    trainer(tmp_path, At(2, act), max_steps=2, limit_val_batches=2, check_val_every_n_epoch=9).fit(
        Signalled(), rows(), rows(12, seed=1)
    )
    assert seen == [0]


def test_a_module_that_validates_with_weights_of_its_own_is_told_once(tmp_path, caplog):
    class Swaps(Regression):
        def on_validation_epoch_start(self) -> None:
            for parameter in self.parameters():
                parameter.data.fill_(0.5)

    trainer(tmp_path, ModelMerging(window=2, every=2), max_steps=6, check_val_every_n_epoch=9).fit(
        Swaps(), rows(), rows(4, seed=1)
    )
    assert sum("raw and merged metrics are equal bit for bit" in line for line in caplog.messages) == 1
