"""HuggingFaceMerging in real Trainers: training untouched, raw and merged by their own evaluation, refusals."""

import random

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate (the extra huggingface)")

from integrations.small_trainers import Plain, Text, merging_of, model_of, trained, trainer_of, weights  # noqa: E402
from transformers import EarlyStoppingCallback, Trainer  # noqa: E402

from pretrain_merge.errors import ConfigError, UnsupportedModelError  # noqa: E402
from pretrain_merge.integrations.trainer_run import _refuse  # noqa: E402
from pretrain_merge.records import read_records  # noqa: E402

_TIMES = ("runtime", "per_second", "total_flos")


def history(trainer):
    """What the Trainer logged itself, less wall-clock times."""
    lines = [line for line in trainer.state.log_history if not any(key.startswith("merge/") for key in line)]
    return [{key: value for key, value in line.items() if not key.endswith(_TIMES)} for line in lines]


def drawn():
    return torch.rand(1).item(), random.random(), np.random.rand()


def assert_untouched(with_, without):
    assert torch.equal(weights(with_), weights(without))
    assert history(with_) == history(without)
    for key in ("global_step", "best_metric", "best_global_step"):
        assert getattr(with_.state, key) == getattr(without.state, key)
    assert with_.control == without.control


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2},
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
        {
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "max_steps": 6,
            "eval_strategy": "steps",
            "eval_steps": 3,
        },
        {
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "save_total_limit": 2,
            "lr_scheduler_type": "reduce_lr_on_plateau",
        },
    ],
    ids=["accumulated", "epochs", "workers", "best"],
)
def test_p39_training_is_the_same_with_and_without_merging(tmp_path, options):
    without = trained(tmp_path / "without", **options)
    after = drawn()
    merging = merging_of(breaks={"lr": False})
    with_ = trained(tmp_path / "with", merging, **options)
    assert drawn() == after
    assert merging.last_record is not None
    assert_untouched(with_, without)


def test_p39_early_stopping_stops_where_it_would_have(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 30}
    options |= {"load_best_model_at_end": True, "learning_rate": 0.05}
    runs = []
    for name, merging in (("without", None), ("with", merging_of())):
        stopping = EarlyStoppingCallback(early_stopping_patience=1)
        runs.append(trained(tmp_path / name, merging, callbacks=[stopping], **options))
    assert runs[0].state.global_step < 30
    assert_untouched(*runs[::-1])


class Notes(transformers.TrainerCallback):
    """Writes down each evaluation that it hears of, where nobody puts anything back."""

    def __init__(self, path):
        self.path = path

    def on_evaluate(self, args, state, control, **_):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{state.global_step}\n")


def test_other_callbacks_hear_of_the_trainers_own_evaluations_only(tmp_path):
    heard = Notes(tmp_path / "heard")
    trained(tmp_path / "run", merging_of(), callbacks=[heard], eval_strategy="steps", eval_steps=6)
    assert heard.path.read_text().split() == ["6", "12"]


def test_raw_is_what_the_trainers_own_evaluation_measures_at_the_same_step(tmp_path):
    trainer = trained(tmp_path, merging_of(), eval_strategy="steps", eval_steps=2, data=Plain(16, 2))
    own = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    records = read_records(tmp_path / "merges.jsonl")
    assert [record.step for record in records] == list(range(4, 13, 2))
    assert {record.step: record.raw["eval_loss"] for record in records} == {step: own[step] for step in range(4, 13, 2)}


def test_metrics_are_in_the_trainers_reports_and_records_agree(tmp_path):
    merging = merging_of()
    trainer = trained(tmp_path, merging)
    lines = [line for line in trainer.state.log_history if "merge/sma/eval_loss" in line]
    records = read_records(tmp_path / "merges.jsonl")
    assert [line["step"] for line in lines] == [record.step for record in records]
    assert (
        lines[-1]["merge/wsm/eval_loss"]
        == records[-1].views["wsm"]["eval_loss"]
        == merging.last_record.views["wsm"]["eval_loss"]
    )
    assert records[-1].raw.keys() == {"eval_loss"}
    assert records[-1].samples == 48
    assert records[-1].lr[0] == 3e-3


def test_p28_the_rate_is_that_of_the_step(tmp_path):
    trained(tmp_path, merging_of(breaks={"lr": False}), lr_scheduler_type="linear", max_steps=10)
    records = read_records(tmp_path / "merges.jsonl")
    assert [record.lr[0] for record in records] == pytest.approx(
        [3e-3 * (1 - (record.step - 1) / 10) for record in records]
    )


def test_several_data_sets_metrics_and_evaluators_of_ones_own(tmp_path):
    def norm(model):
        assert not model.training
        return {"l2": sum(parameter.square().sum() for parameter in model.parameters()).sqrt()}

    merging = merging_of(evaluators={"norm": norm})
    trained(tmp_path, merging, data={"a": Text(8, 3), "b": Text(8, 4)})
    assert merging.last_record.raw.keys() == {"eval_a_loss", "eval_b_loss", "norm/l2"}
    assert merging.last_record.views["sma"]["norm/l2"] < merging.last_record.raw["norm/l2"]


def test_tokens_are_those_that_the_trainer_counts(tmp_path):
    merging = merging_of(every="64 tokens")
    trained(tmp_path, merging, include_num_input_tokens_seen="all", max_steps=10)
    assert merging.last_record.tokens == 10 * 4 * 8
    assert merging.last_record.recipes["sma"].steps == (6, 8, 10)
    with pytest.raises(ConfigError, match="include_num_input_tokens_seen='all'"):
        trained(tmp_path, merging_of(every="64 tokens"))


class AverageOfItsOwn(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


def test_what_cannot_be_merged_exactly_is_refused_before_the_first_step(tmp_path):
    model = model_of()
    trainer = trainer_of(tmp_path, merging_of(), model=model)
    trainer.optimizer = AverageOfItsOwn(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match="switches the model between training weights and an average"):
        trainer.train()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(UnsupportedModelError, match="DeepSpeed is not supported"):
        _refuse(merging_of().settings, trainer)


def test_keys_that_are_not_choices_here_say_so():
    with pytest.raises(ConfigError, match=r"tokens_per_batch: .*include_num_input_tokens_seen"):
        merging_of(tokens_per_batch=4)
    with pytest.raises(ConfigError, match="windw"):
        merging_of(windw=4)
    with pytest.raises(UnsupportedModelError, match=r"Trainer\(callbacks=\[merging\]\)"):
        merging_of().on_train_begin(None, None, None)
    with pytest.raises(ConfigError, match="before training has begun"):
        merging_of().mark_phase("x")


class Spiking(Trainer):
    """What a step returns is scripted; its gradients are those of the model."""

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        step = self.state.global_step + 1
        return torch.full_like(loss, 1.0 + 0.01 * (step * 7 % 11) + 2.0 * (64 <= step < 69))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_spike_of_the_training_loss_is_a_break(accumulated, tmp_path):
    options = {"window": 8, "every": 10, "merge_every": 10, "breaks": {"distrust": 25}, "validate": False}
    merging = merging_of(**options, views=["sma"], evaluators={"own": lambda _: {"x": 1.0}}, save={"best": "own/x"})
    trainer = trained(
        tmp_path, merging, kind=Spiking, max_steps=90, gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=1,
    )  # fmt: skip
    last = merging.last_record
    assert (last.step, last.spikes, last.since) == (90, 1, 70)
    assert last.why_since.startswith("spike from step 64 on")
    assert last.recipes["sma"].steps == (80, 90)
    assert "training_step" not in vars(trainer)  # given back
