"""HuggingFaceMerging in real Trainers: training untouched, raw and merged by their own evaluation, exact resume."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate (the extra huggingface)")

from torch.utils.data import Dataset  # noqa: E402
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

from pretrain_merge import load_merged  # noqa: E402
from pretrain_merge.errors import CheckpointError, ConfigError, UnsupportedModelError  # noqa: E402
from pretrain_merge.integrations import HuggingFaceMerging  # noqa: E402
from pretrain_merge.integrations.trainer_run import _refuse  # noqa: E402
from pretrain_merge.records import read_records  # noqa: E402

_TIMES = ("runtime", "per_second", "total_flos")


class Text(Dataset):
    """Rows of tokens; reading one draws from the random numbers of the process, as augmentations do."""

    def __init__(self, size, seed):
        self.rows = torch.randint(0, 32, (size, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].roll(random.randrange(2) + int(torch.randint(2, ())))
        return {"input_ids": row, "labels": row}


class Plain(Text):
    """Rows that draw nothing, so that two evaluations at one step agree."""

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def model_of(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def trainer_of(folder, merging=None, *, kind=Trainer, callbacks=(), model=None, data=None, rows=Text, **options):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 5,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
        }
        | options
    )
    return kind(
        model=model or model_of(),
        args=arguments,
        train_dataset=rows(64, 1),
        eval_dataset=data if data is not None else Text(16, 2),
        callbacks=[*callbacks, *([merging] if merging else [])],
    )


def merging_of(**options):
    return HuggingFaceMerging(**{"window": 3, "every": 2, "views": ["sma", "wsm"]} | options)


def trained(folder, merging=None, *, resume=None, **options):
    trainer = trainer_of(folder, merging, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


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


@pytest.mark.parametrize(
    ("average", "options"), [("last", {"gradient_accumulation_steps": 2}), ("block", {})], ids=["last", "block"]
)
def test_a_resumed_run_goes_on_exactly(tmp_path, average, options):
    # rows that draw nothing: a resumed Trainer has fetched its first batches before it restores random numbers
    saves = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "rows": Plain, **options}
    whole = trained(tmp_path / "whole", merging_of(average=average, save={"best": "eval_loss"}), **saves)
    trained(tmp_path / "part", merging_of(average=average, save={"best": "eval_loss"}), **saves)
    os.rename(tmp_path / "part" / "checkpoint-10", tmp_path / "later")  # as if it had been killed before
    again = trained(tmp_path / "part", merging_of(average=average, save={"best": "eval_loss"}), resume=True, **saves)
    assert torch.equal(weights(whole), weights(again))
    ours, theirs = ([without_times(line) for line in lines(tmp_path / name)] for name in ("whole", "part"))
    assert ours == theirs
    best = [json.loads((tmp_path / name / "merged" / "best.json").read_text()) for name in ("whole", "part")]
    assert best[0] == best[1]


def lines(folder):
    return [json.loads(line) for line in (folder / "merges.jsonl").read_text().splitlines()]


def without_times(line):
    return {key: value for key, value in line.items() if key != "timing"}


def test_window_files_go_with_the_checkpoints_that_need_them(tmp_path):
    trained(tmp_path, merging_of(), save_strategy="steps", save_steps=2, save_total_limit=2, max_steps=12)
    window = tmp_path / "window"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    assert sorted(path.name for path in window.glob("state-*")) == ["state-00000010.json", "state-00000012.json"]
    assert sorted(path.name.split("-")[1] for path in window.glob("snapshot-*")) == [
        f"{step:08d}" for step in (6, 8, 10, 12)
    ]


def test_a_window_that_is_lost_is_an_error_or_starts_empty_as_asked(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    trained(tmp_path, merging_of(), **saves)
    os.rename(tmp_path / "checkpoint-12", tmp_path / "later")
    for file in (tmp_path / "window").glob("snapshot-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"on_missing='refill'"):
        trained(tmp_path, merging_of(), resume=True, **saves)
    merging = merging_of(on_missing="refill")
    trained(tmp_path, merging, resume=True, **saves)
    assert merging.last_record.recipes["sma"].steps == (8, 10, 12)


def test_a_run_that_had_no_merging_before_starts_with_an_empty_window(tmp_path, caplog):
    saves = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    trained(tmp_path, **saves)
    merging = merging_of()
    trained(tmp_path, merging, resume=True, **saves | {"max_steps": 12})
    assert merging.last_record.recipes["sma"].steps == (8, 10, 12)
    assert "the window starts empty" in caplog.text


def test_a_checkpoint_moved_with_its_window_is_found_beside_it(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    trained(tmp_path / "before", merging_of(), **saves)
    os.rename(tmp_path / "before", tmp_path / "after")
    merging = merging_of()
    trained(tmp_path / "new", merging, resume=str(tmp_path / "after" / "checkpoint-6"), **saves | {"max_steps": 8})
    assert merging.last_record.recipes["sma"].steps == (4, 6, 8)


def test_merged_models_are_read_by_from_pretrained_with_their_tokenizer(tmp_path):
    merging = merging_of(save={"best": "eval_loss", "at_end": True})
    trainer = trainer_of(tmp_path, merging)
    trainer.processing_class = Processing()
    trainer.train()
    folder = merging.best_model_path
    read = GPT2LMHeadModel.from_pretrained(folder)
    assert (folder / "tokenizer.txt").read_text() == "vocabulary"
    expected = model_of()
    load_merged(expected, folder)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), expected.parameters(), strict=True))
    trainer.save_model(str(tmp_path / "own"))
    own = GPT2LMHeadModel.from_pretrained(tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), trainer.model.parameters(), strict=True))
    assert len(list((tmp_path / "merged").glob("step-00000012-*"))) == 2


class Processing:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder, **_):
        (folder if hasattr(folder, "joinpath") else __import__("pathlib").Path(folder)).joinpath(
            "tokenizer.txt"
        ).write_text("vocabulary")


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


def test_an_exception_in_an_evaluation_leaves_raw_weights_and_a_folder_that_the_next_run_can_use(tmp_path):
    def fails(model):
        raise RuntimeError("no disk")

    trainer = trainer_of(tmp_path, merging_of(evaluators={"lm": fails}))
    with pytest.raises(RuntimeError, match="no disk"):
        trainer.train()
    without = trained(tmp_path / "without", max_steps=4)
    assert torch.equal(weights(trainer), weights(without))
    merging = merging_of()
    trained(tmp_path, merging)
    assert merging.last_record.step == 12


def test_p08_sigterm_in_an_evaluation_finds_raw_weights_and_the_merge_is_made_when_resumed(tmp_path):
    found = []

    def interrupted(model):
        if not found and trainer.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": 1.0}

    saves = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    trainer = trainer_of(tmp_path, merging_of(evaluators={"lm": interrupted}), **saves)
    before = signal.signal(signal.SIGTERM, lambda *_: found.append(weights(trainer).clone()))
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert torch.equal(found[0], weights(trainer))
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4]
    trained(tmp_path, merging_of(), resume=True, **saves)
    assert [record.step for record in read_records(tmp_path / "merges.jsonl")] == [4, 6]


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


def test_a_second_call_of_train_is_a_new_run_and_the_first_ones_files_stay(tmp_path):
    trainer = trained(tmp_path, merging_of())
    trainer.train()
    assert [len(read_records(tmp_path / name)) for name in ("merges.jsonl", "merges.1.jsonl")] == [5, 5]


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
