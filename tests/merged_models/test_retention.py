"""Merged models on disk: which are written, which go, and that they load back as what they were."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import (
    LIGHTNING_REMARKS,
    Recorder,
    Regression,
    TiedModel,
    documents,
    rows,
    same_bits,
    trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files.atomic import remove_leftovers
from pretrain_merge.files.folders import discard
from pretrain_merge.merged_models.choosing import BEST
from pretrain_merge.merged_models.merged import holds_weights_of
from pretrain_merge.merged_models.retention import MergedModels, SavedModels
from pretrain_merge.records import Recipe

pytestmark = LIGHTNING_REMARKS


def models(folder: Path, start: Progress | None = None, **options: Any) -> MergedModels:
    return MergedModels(folder / "merged", SaveConfig(**options), {"window": 3}, start)


def keep(
    own: MergedModels, step: int, *, view: str = "sma", trusted_until: int | None = None, **metrics: float
) -> None:
    recipe, now = Recipe((step - 1, step), (0.5, 0.5)), Progress(step, step * 2, step * 10)
    own.save_if_due(nn.Linear(1, 1), view, now, recipe, metrics, trusted_until=trusted_until)


def note(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merged" / BEST).read_text())
    return found


def why_withdrawn(folder: Path, name: str) -> str | None:
    about = json.loads((folder / "merged" / name / "provenance.json").read_text())
    return about.get("withdrawn")


def saved(folder: Path) -> list[str]:
    merged = folder / "merged"
    return sorted(path.name for path in merged.iterdir() if path.name != BEST) if merged.exists() else []


# --- which are written ---


def test_nothing_is_written_unless_asked(tmp_path):
    keep(models(tmp_path), 10, val_loss=1.0)
    assert saved(tmp_path) == []


def test_every_saves_the_first_merge_after_each_multiple_and_keeps_the_newest(tmp_path):
    own = models(tmp_path, every=20, keep=2)
    for step in range(7, 100, 7):
        keep(own, step)
    # 21, 42, 63 and 84 are the first merges at or after 20, 40, 60 and 80
    assert saved(tmp_path) == ["step-00000063-sma", "step-00000084-sma"]


def test_every_can_count_tokens(tmp_path):
    own = models(tmp_path, every="150 tokens", keep=9)
    for step in range(5, 50, 5):
        keep(own, step)
    assert saved(tmp_path) == ["step-00000015-sma", "step-00000030-sma", "step-00000045-sma"]


def test_each_view_has_a_periodic_series_of_its_own(tmp_path):
    own = models(tmp_path, every=10)
    for step in (10, 20):
        for view in ("sma", "wma"):
            keep(own, step, view=view)
    assert saved(tmp_path) == ["step-00000020-sma", "step-00000020-wma"]


@pytest.mark.parametrize(("mode", "best"), [("min", "step-00000020-wma"), ("max", "step-00000030-sma")])
def test_best_keeps_one_model_over_all_views(mode, best, tmp_path):
    own = models(tmp_path, best="score", mode=mode)
    for step, sma, wma in ((10, 5.0, 6.0), (20, 4.0, 3.0), (30, 7.0, float("nan")), (40, 6.0, 4.5)):
        keep(own, step, score=sma)
        keep(own, step, view="wma", score=wma)
    assert saved(tmp_path) == [best]
    assert own.best_path == tmp_path / "merged" / best


def test_a_model_that_is_best_outlives_its_turn_as_periodic(tmp_path):
    own = models(tmp_path, every=10, keep=1, best="score")
    for step, score in ((10, 1.0), (20, 2.0), (30, 3.0)):
        keep(own, step, score=score)
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000030-sma"]
    keep(own, 35, score=0.5)
    assert saved(tmp_path) == ["step-00000030-sma", "step-00000035-sma"]


def test_best_of_a_metric_that_is_not_measured_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"save\.best: 'val_los' was not measured\. Measured: val_loss, f1\."):
        keep(models(tmp_path, best="val_los"), 10, val_loss=1.0, f1=2.0)


def test_what_was_saved_is_known_after_a_restart(tmp_path):
    own = models(tmp_path, every=10, keep=1, best="score")
    for step, score in ((10, 1.0), (20, 2.0)):
        keep(own, step, score=score)
    state = own.state()
    own = models(tmp_path, Progress(20, 40, 200), every=10, keep=1, best="score")
    own.resume_from(state, tmp_path / "merged")
    keep(own, 25, score=3.0)  # neither due nor better
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000020-sma"]
    keep(own, 30, score=4.0)
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000030-sma"]
    assert own.best_path.name == "step-00000010-sma"


def test_a_best_model_that_is_gone_is_not_best(tmp_path):
    own = models(tmp_path, best="score")
    gone = "step-00000001-sma"
    own.resume_from(SavedModels(periodic={"sma": (gone,)}, best=gone, best_score=0.1), tmp_path / "merged")
    keep(own, 10, score=1.0)
    assert own.best_path.name == "step-00000010-sma"


def test_a_run_that_goes_on_in_a_copy_of_its_folder_deletes_nothing_of_the_original(tmp_path):
    own = models(tmp_path / "original", every=10, keep=1, best="score")
    keep(own, 10, score=1.0)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copy = models(tmp_path / "copy", every=10, keep=1, best="score")
    copy.resume_from(own.state(), tmp_path / "original" / "merged")
    for step, score in ((20, 0.5), (30, 0.1)):
        keep(copy, step, score=score)
    assert saved(tmp_path / "original") == ["step-00000010-sma"]
    assert saved(tmp_path / "copy") == ["step-00000030-sma"]


def test_a_run_that_goes_on_in_a_new_folder_knows_the_best_before_and_leaves_it_there(tmp_path):
    own = models(tmp_path / "first", every=10, keep=1, best="score")
    keep(own, 10, score=1.0)
    second = models(tmp_path / "second", every=10, keep=1, best="score")
    second.resume_from(own.state(), own.folder)
    third = models(tmp_path / "third", every=10, keep=1, best="score")
    third.resume_from(second.state(), second.folder)
    keep(third, 15, score=2.0)
    assert third.best_path == tmp_path / "first" / "merged" / "step-00000010-sma"
    keep(third, 25, score=0.5)
    assert saved(tmp_path / "first") == ["step-00000010-sma"]
    assert third.best_path == tmp_path / "third" / "merged" / "step-00000025-sma"


@pytest.mark.parametrize("name", ["..", ".", "../window", "step-00000010-sma/../../../precious", "notes"])
def test_a_checkpoint_that_names_another_folder_makes_nothing_go_there(name, tmp_path):
    for path in (tmp_path / "window", tmp_path / "merged" / "notes", tmp_path.parent / "precious"):
        path.mkdir(parents=True, exist_ok=True)
    own = models(tmp_path, every=10, keep=1, best="score")
    own.resume_from(SavedModels(periodic={"sma": (name,)}, best=name, best_score=9.0), tmp_path / "merged")
    keep(own, 10, score=1.0)
    assert saved(tmp_path) == ["notes", "step-00000010-sma"]
    assert (tmp_path / "window").exists()
    assert (tmp_path.parent / "precious").exists()


def test_a_view_not_yet_merged_keeps_its_turn_through_a_restart(tmp_path):
    own = models(tmp_path, every=20)
    keep(own, 15)
    again = models(tmp_path, Progress(25, 50, 250), every=20)
    again.resume_from(own.state(), own.folder)
    keep(again, 30, view="wma")  # the first merge of this view, at or after 20
    assert saved(tmp_path) == ["step-00000030-wma"]


def test_a_model_whose_deletion_was_broken_off_looks_incomplete(tmp_path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    keep(models(tmp_path, every=10), 10)
    monkeypatch.setattr("pretrain_merge.files.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "merged" / "step-00000010-sma")
    monkeypatch.undo()
    (left,) = saved(tmp_path)
    assert left.endswith(".tmp")
    remove_leftovers(tmp_path / "merged")
    assert saved(tmp_path) == []


def test_the_same_merge_is_not_written_twice(tmp_path):
    torch.manual_seed(1)
    keep(models(tmp_path, every=10), 10)
    path = tmp_path / "merged" / "step-00000010-sma" / "model.safetensors"
    before = path.stat().st_ino
    torch.manual_seed(1)
    keep(models(tmp_path, every=10), 10)
    assert path.stat().st_ino == before
    assert saved(tmp_path) == ["step-00000010-sma"]


def test_what_a_run_left_that_went_another_way_is_moved_aside_and_not_taken_for_ours(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        keep(models(tmp_path, every=10), 10)
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000010-sma.1"]
    torch.manual_seed(2)
    assert holds_weights_of(nn.Linear(1, 1), tmp_path / "merged" / "step-00000010-sma")


# --- withdrawn by a spike ---


def test_a_withdrawn_model_is_never_the_best_and_says_why(tmp_path):
    own = models(tmp_path, every=20, keep=2, best="score")
    for step, score in ((10, 3.0), (20, 2.0), (30, 1.0)):
        keep(own, step, score=score, trusted_until=step - 15)
    assert note(tmp_path)["folder"] == "step-00000030-sma"
    own.withdraw(15, "a spike")
    assert own.best_path.name == note(tmp_path)["folder"] == "step-00000010-sma"
    assert note(tmp_path)["withdrawn"] == {"step-00000020-sma": "a spike", "step-00000030-sma": "a spike"}
    # 30 was there as the best only; 20 is kept by its turn
    assert saved(tmp_path) == ["step-00000010-sma", "step-00000020-sma"]
    assert why_withdrawn(tmp_path, "step-00000020-sma") == "a spike"
    assert why_withdrawn(tmp_path, "step-00000010-sma") is None
    keep(own, 50, score=2.5, trusted_until=35)
    assert own.best_path.name == "step-00000050-sma"  # better than what was left


def test_without_a_model_from_before_there_is_no_best_and_the_reason_is_told(tmp_path):
    own = models(tmp_path, every=10, best="score")
    keep(own, 10, score=1.0, trusted_until=0)
    own.withdraw(5, "a spike from step 12 on")
    assert own.best_path is None
    with pytest.raises(CheckpointError, match=r"step-00000010-sma was withdrawn: a spike from step 12 on"):
        load_merged(nn.Linear(1, 1), tmp_path, which="best")
    with pytest.raises(CheckpointError, match=r"every merged model .* was withdrawn .a spike from step 12"):
        load_merged(nn.Linear(1, 1), tmp_path, which="last")


def test_the_last_merged_model_is_one_that_was_not_withdrawn(tmp_path, caplog):
    own = models(tmp_path, every=10, keep=3)
    for step in (10, 20, 30):
        keep(own, step)
    own.withdraw(20, "a spike")
    assert load_merged(nn.Linear(1, 1), tmp_path, which="last")["step"] == 20
    caplog.clear()
    load_merged(nn.Linear(1, 1), tmp_path / "merged" / "step-00000030-sma")
    assert "step-00000030-sma was withdrawn (a spike)" in caplog.text


@pytest.mark.parametrize("improves", [True, False])
def test_models_that_stand_in_for_the_best_are_at_most_two_and_end_with_the_run(improves, tmp_path):
    own = models(tmp_path, best="score")
    for step in range(10, 400, 10):
        keep(own, step, score=-step if improves else step, trusted_until=step - 100)
        assert len(saved(tmp_path)) <= 3
    if improves:  # a spike that reaches as far as it may leaves one that is not much older
        own.withdraw(290, "a spike")
        assert 100 <= int(own.best_path.name[5:13]) <= 290
    own.finish()
    assert saved(tmp_path) == [own.best_path.name]


def test_a_run_that_goes_on_from_before_a_spike_has_withdrawn_nothing_yet(tmp_path):
    own = models(tmp_path, every=10, keep=2, best="score")
    for step, score in ((10, 2.0), (20, 1.0)):
        keep(own, step, score=score, trusted_until=0)
    before = own.state()
    own.withdraw(15, "a spike")
    after = own.state()
    states = {}
    for name, state in (("after", after), ("before", before)):
        again = models(tmp_path, every=10, keep=2, best="score")
        again.resume_from(state, own.folder)
        states[name] = (again.best_path.name, why_withdrawn(tmp_path, "step-00000020-sma"), note(tmp_path)["folder"])
        assert again.state() == state
    assert states["before"] == ("step-00000020-sma", None, "step-00000020-sma")
    assert states["after"] == ("step-00000010-sma", "a spike", "step-00000010-sma")


# --- in a Trainer ---


def test_provenance_says_where_every_number_comes_from(tmp_path):
    merging = ModelMerging(window=3, every=2, views=["wma"], save={"every": 6})
    trainer(tmp_path, merging, max_steps=6).fit(TiedModel(), documents(), documents(4, seed=1))
    about = json.loads((tmp_path / "merged" / "step-00000006-wma" / "provenance.json").read_text())
    assert about["view"] == "wma"
    assert (about["step"], about["samples"], about["tokens"]) == (6, 24, 144)
    assert about["steps"] == [2, 4, 6]
    assert about["coefficients"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert about["metrics"] == merging.last_record.views["wma"]
    assert (about["config"]["window"], about["config"]["views"]) == (3, ["wma"])
    assert about["dtypes"] == ["bool", "float32", "int64"]
    assert about["ties"] == {"head.weight": "embedding.weight"}
    assert {"torch", "lightning", "pretrain-merge"} <= about["versions"].keys()


def test_at_end_saves_every_view_and_training_ends_raw(tmp_path):
    recorder, module = Recorder(), Regression()
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"], save={"at_end": True})
    trainer(tmp_path, merging, recorder, max_steps=7).fit(module, rows(), rows(4, seed=1))
    assert saved(tmp_path) == ["step-00000006-sma", "step-00000006-wma"]
    assert same_bits(weights(module), recorder.run.weights[-1])
    merged = Regression()
    about = load_merged(merged, tmp_path / "merged" / "step-00000006-wma")
    assert about["steps"] == [4, 6]
    for name, value in merged.state_dict().items():
        raw = [recorder.run.weights[step - 1][name].double() for step in (4, 6)]
        torch.testing.assert_close(value.double(), raw[0] / 3 + 2 * raw[1] / 3, rtol=1e-6, atol=1e-8)


def test_at_end_of_a_run_too_short_to_merge_saves_nothing(tmp_path):
    merging = ModelMerging(window=2, every=2, save={"at_end": True})
    trainer(tmp_path, merging, max_steps=3).fit(Regression(), rows(), rows(4, seed=1))
    assert saved(tmp_path) == []


def test_best_is_the_best_of_the_records(tmp_path):
    merging = ModelMerging(window=3, every=2, views=["sma", "wma"], save={"best": "val_loss"})
    validation = rows(10, seed=1)
    own = trainer(tmp_path, merging, max_steps=12)
    own.fit(Regression(), rows(), validation)
    lines = [json.loads(line) for line in (tmp_path / "merges.jsonl").read_text().splitlines()]
    values = {
        f"step-{line['step']:08d}-{view}": metrics["val_loss"]
        for line in lines
        for view, metrics in line["views"].items()
        if not view.startswith("forecast/")  # means that nobody asked for are not saved
    }
    best = min(values, key=values.get)
    assert saved(tmp_path) == [best] == [merging.best_model_path.name]
    module = Regression()
    load_merged(module, merging.best_model_path)
    (measured,) = trainer(tmp_path).validate(module, validation, verbose=False)
    assert measured["val_loss"] == values[best]


def test_best_survives_a_resume(tmp_path):
    scores = iter([9.0, 1.0, 9.0, 5.0, 9.0, 3.0])  # raw, merged, raw, merged, …

    def fit(steps: int, **options: Any) -> ModelMerging:
        merging = ModelMerging(
            window=2, every=2, save={"best": "own/x"}, evaluators={"own": lambda _: {"x": next(scores)}}
        )
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, filename="{step}", save_top_k=-1)
        trainer(tmp_path, merging, saving, max_steps=steps).fit(Regression(), rows(), rows(4, seed=1), **options)
        return merging

    fit(5)
    merging = fit(9, ckpt_path=tmp_path / "kept" / "step=5.ckpt")
    assert merging.last_record.step == 8
    assert merging.best_model_path.name == "step-00000004-sma"
    assert saved(tmp_path) == ["step-00000004-sma"]


def test_a_metric_that_is_not_measured_stops_the_run_at_its_first_merge_with_raw_weights(tmp_path):
    recorder, module = Recorder(), Regression()
    merging = ModelMerging(window=2, every=2, save={"best": "val_los"})
    with pytest.raises(ConfigError, match=r"save\.best: 'val_los' was not measured"):
        trainer(tmp_path, recorder, merging, max_steps=6).fit(module, rows(), rows(4, seed=1))
    assert same_bits(weights(module), recorder.run.weights[3])


def test_merged_models_of_an_earlier_run_are_moved_aside(tmp_path):
    for _ in range(2):
        merging = ModelMerging(window=2, every=2, save={"at_end": True})
        trainer(tmp_path, merging, max_steps=4).fit(Regression(), rows(), rows(4, seed=1))
    assert saved(tmp_path) == ["step-00000004-sma"]
    assert (tmp_path / "merged.1" / "step-00000004-sma" / "model.safetensors").exists()


def test_a_full_disk_is_an_error_and_raw_is_back(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain_merge.merged_models.whole_weights.save_file", full)
    recorder, module = Recorder(), Regression()
    merging = ModelMerging(window=2, every=2, save={"every": 2})
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free space"):
        trainer(tmp_path, recorder, merging, max_steps=6).fit(module, rows(), rows(4, seed=1))
    assert same_bits(weights(module), recorder.run.weights[3])
    assert saved(tmp_path) == []  # nothing half-written


# --- loading ---


@pytest.fixture
def merged_tied_model(tmp_path: Path) -> Path:
    merging = ModelMerging(window=2, every=2, save={"at_end": True})
    trainer(tmp_path, merging, max_steps=4).fit(TiedModel(), documents(), documents(4, seed=1))
    return tmp_path / "merged" / "step-00000004-sma"


def test_tied_weights_are_stored_once_and_load_back_tied(merged_tied_model):
    from safetensors import safe_open

    with safe_open(merged_tied_model / "model.safetensors", framework="pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118 - safe_open is no mapping
        assert "head.weight" not in file.keys()  # noqa: SIM118
    module = TiedModel()
    load_merged(module, merged_tied_model)
    assert module.head.weight is module.embedding.weight


@pytest.mark.parametrize(
    ("other", "pieces"),
    [
        (lambda: TiedModel(width=5), ["embedding.weight", "(11, 4) in the file", "(11, 5) here"]),
        (lambda: TiedModel().bfloat16(), ["embedding.weight", "torch.float32", "torch.bfloat16"]),
        (lambda: Regression(), ["missing in the file: net.0.weight", "not in the model: embedding.weight"]),
        (lambda: nn.Linear(1, 1), [["missing in the file: bias", " missing in the file: weight"][0]]),
    ],
)
def test_another_model_is_refused_with_what_differs_and_left_as_it_was(other, pieces, merged_tied_model):
    module = other()
    before = weights(module)
    with pytest.raises(CheckpointError) as error:
        load_merged(module, merged_tied_model)
    for piece in [*pieces, "does not fit", type(module).__name__, "Build the model with the configuration"]:
        assert piece in str(error.value)
    assert same_bits(weights(module), before)


def test_a_folder_that_is_no_merged_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a merged model.*as ModelMerging saves it under merged/"):
        load_merged(TiedModel(), tmp_path)


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_truncated_file_is_refused(cut, merged_tied_model):
    path = merged_tied_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    module = TiedModel()
    before = weights(module)
    with pytest.raises(CheckpointError, match="Copy the folder again"):
        load_merged(module, merged_tied_model)
    assert same_bits(weights(module), before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_a_merged_model_loads_back_bit_for_bit(precision, tmp_path):
    shown: list[dict[str, Tensor]] = []
    merging = ModelMerging(
        window=2, every=2, save={"every": 4}, evaluators={"look": lambda module: shown.append(weights(module)) or {}}
    )
    trainer(tmp_path, merging, max_steps=4, precision=precision).fit(TiedModel(), documents(), documents(4, seed=1))
    module = TiedModel().to(shown[-1]["embedding.weight"].dtype)
    load_merged(module, tmp_path / "merged" / "step-00000004-sma")
    assert same_bits(weights(module), shown[-1])


# --- Hugging Face ---

_SIZES = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def _hugging_face_module(kind: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **options)

    class Module(TiedModel):
        def __init__(self) -> None:
            super(TiedModel, self).__init__()
            self.model = getattr(transformers, f"{kind}ForCausalLM")(config)

        def loss(self, batch: Any) -> Tensor:
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.float()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    return Module()


@pytest.mark.parametrize(
    ("kind", "options", "precision"),
    [
        ("Llama", {"tie_word_embeddings": True}, "32-true"),
        ("Llama", {"tie_word_embeddings": False}, "bf16-true"),
        ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, "32-true"),
    ],
)
def test_a_hugging_face_model_loads_back_with_from_pretrained(kind, options, precision, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens, logits = torch.arange(10).view(1, 10), []
    module = _hugging_face_module(kind, **options)

    def look(module: Any) -> dict[str, float]:
        logits.append(module.model(input_ids=tokens).logits)
        return {}

    merging = ModelMerging(window=2, every=2, save={"every": 4}, evaluators={"look": look})
    trainer(tmp_path, merging, max_steps=4, precision=precision).fit(module, documents(), documents(4, seed=1))
    folder = tmp_path / "merged" / "step-00000004-sma"
    assert {"config.json", "model.safetensors", "provenance.json"} <= {path.name for path in folder.iterdir()}
    loaded = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(folder, dtype="auto").eval()
    # a copy, since kernels round otherwise in memory that is mapped at odd addresses; and all in one dtype, rotary
    # frequencies too, as Lightning's bf16-true has it
    loaded = copy.deepcopy(loaded).to(logits[0].dtype)
    raw, merged = logits
    with torch.no_grad():
        assert same_bits(loaded(input_ids=tokens).logits, merged)
    assert not same_bits(raw, merged)
    again = _hugging_face_module(kind, **options).to(loaded.dtype)
    load_merged(again, folder)
    with torch.no_grad():
        assert same_bits(again.eval().model(input_ids=tokens).logits, merged)
