"""HuggingFaceMerging's files: exact resume from any checkpoint, and models that `from_pretrained` reads."""

import json
import os
import signal

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate (the extra huggingface)")

from integrations.small_trainers import Plain, lines, merging_of, model_of, trained, trainer_of, weights  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

from pretrain_merge import load_merged  # noqa: E402
from pretrain_merge.errors import CheckpointError  # noqa: E402
from pretrain_merge.records import read_records  # noqa: E402


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


def test_a_second_call_of_train_is_a_new_run_and_the_first_ones_files_stay(tmp_path):
    trainer = trained(tmp_path, merging_of())
    trainer.train()
    assert [len(read_records(tmp_path / name)) for name in ("merges.jsonl", "merges.1.jsonl")] == [5, 5]
