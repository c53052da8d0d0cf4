"""The commands `merge` and `export`: their words, what they print, and how they refuse."""

import json
import sys
import types

import pytest
import torch
from offline import writers
from offline.writers import read, tensors

from pretrain_merge.cli.main import main
from pretrain_merge.cli.merge import read_mergekit
from pretrain_merge.errors import ConfigError
from pretrain_merge.offline import plain_pickle


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [str(writers.lightning(tmp_path, step, tensors(step)).name) for step in (100, 200, 300)]


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", *map(str, arguments)])
    main()


def test_checkpoints_are_words_before_the_options(monkeypatch, capsys, places):
    call(monkeypatch, "merge", *places, "--view", "wma", "--out", "out")
    assert read("out")[1]["coefficients"] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    printed = capsys.readouterr().out
    assert "+0.5000  step 300" in printed
    assert "Merged: out" in printed


@pytest.mark.parametrize("hyphen", ["-", "_"])
def test_options_stand_anywhere_and_are_spelled_as_in_a_shell_or_as_in_python(monkeypatch, places, hyphen):
    options = ["--out", "out", f"--largest{hyphen}file=300"]
    call(monkeypatch, "merge", places[0], "--quiet", *options, *places[1:])
    assert len(read("out")[1]["sources"]) == 3
    assert len(read("out")[1]["files"]) > 1


@pytest.mark.parametrize(
    ("view", "coefficients"),
    [
        ("[-0.5, 0.5, 1.0]", [-0.5, 0.5, 1.0]),
        ("sma2", [0.5, 0.5]),
        ("{name: d, kind: decay, shape: [1, 0.5, 0.5, 0]}", [0.5, 0.0, 0.5]),
    ],
)
def test_a_view_is_a_name_a_mapping_or_a_list(monkeypatch, places, view, coefficients):
    call(monkeypatch, "merge", *places, "--view", view, "--out", "out")
    assert read("out")[1]["coefficients"] == pytest.approx(coefficients)


@pytest.mark.parametrize(
    "options",
    [
        ["--newest", "a.*", "--newest", "b.*"],
        ["--newest=a.*", "--newest=b.*"],
        ["--newest", "[a.*, b.*]"],
        ["--newest", '["a.*", "b.*"]'],
        ["--newest", "[ab].*"],  # a pattern by itself
    ],
)
def test_patterns_are_plain_words_as_often_as_there_are(monkeypatch, places, options):
    call(monkeypatch, "merge", *places, "--out", "out", *options)
    assert {"a.weight", "b.weight"} <= set(read("out")[1]["copied"])


def test_numbers_of_a_list_are_plain_words_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        torch.save({"w": torch.ones(2)}, f"{name}.pt")
    call(monkeypatch, "merge", "x.pt", "y.pt", "--out", "out", "--steps", "10", "--steps", "20")
    assert read("out")[1]["steps"] == [10, 20]


OWN = """
import dataclasses, pathlib
pathlib.Path("imported").touch()
@dataclasses.dataclass
class Config:
    rate: float
"""


@pytest.fixture
def of_own_class(monkeypatch, tmp_path):
    """A Lightning checkpoint whose hyperparameters hold a dataclass of the script that trained it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_train", raising=False)
    monkeypatch.setattr(plain_pickle, "_passed_over", set())
    monkeypatch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", set())
    (tmp_path / "own_train.py").write_text(OWN)
    made = types.ModuleType("own_train")
    exec("import dataclasses\n" + OWN.partition("touch()")[2], made.__dict__)  # as a run of the script did
    monkeypatch.setitem(sys.modules, "own_train", made)
    path = writers.lightning(tmp_path, 100, {"w": torch.ones(2)}, hyper_parameters={"config": made.Config(3e-4)})
    monkeypatch.delitem(sys.modules, "own_train")
    return path.name


def test_a_class_of_the_users_own_is_imported_only_where_it_is_named(monkeypatch, tmp_path, of_own_class):
    with pytest.raises(SystemExit, match=r"own_train\.Config, which is not run.*--allow own_train\.Config"):
        call(monkeypatch, "merge", of_own_class, "--out", "merged")
    assert not (tmp_path / "imported").exists()
    call(monkeypatch, "merge", of_own_class, "--out", "merged", "--allow", "own_train.Config")
    assert not (tmp_path / "imported").exists()  # what is passed over needs no import
    call(monkeypatch, "export", "merged", "--to", "ckpt", "--base", of_own_class, "--out", "out.ckpt", "--allow",
         "own_train.Config")  # fmt: skip
    assert (tmp_path / "imported").exists()
    config = torch.load("out.ckpt", weights_only=False)["hyper_parameters"]["config"]
    assert config.rate == 3e-4


def test_a_class_of_a_script_is_allowed_by_the_name_that_it_has_for_others(monkeypatch, tmp_path, of_own_class):
    made = types.ModuleType("__main__")
    exec("import dataclasses\n" + OWN.partition("touch()")[2], made.__dict__)
    monkeypatch.setattr(sys.modules["__main__"], "Config", made.Config, raising=False)
    path = writers.lightning(tmp_path, 200, {"w": torch.ones(2)}, hyper_parameters={"config": made.Config(1e-3)})
    with pytest.raises(SystemExit, match=r"--allow __main__\.Config"):
        call(monkeypatch, "merge", path, "--out", "merged")
    call(monkeypatch, "merge", path, "--out", "merged", "--allow", "__main__.Config")
    export = ["export", "merged", "--to", "ckpt", "--base", path, "--out", "out.ckpt", "--allow"]
    with pytest.raises(SystemExit, match=r"one of a script train\.py is train\.Class"):
        call(monkeypatch, *export, "__main__.Other")
    call(monkeypatch, *export, "own_train.Config")
    assert (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere.Config", "is not there"), ("json.dumps", "is a function"), ("x", "is not there")]
)
def test_what_is_no_class_is_not_allowed(monkeypatch, of_own_class, name, said):
    with pytest.raises(SystemExit, match=rf"^ConfigError: allow: '{name}' {said}.*package\.module\.Class"):
        call(monkeypatch, "export", of_own_class, "--to", "ckpt", "--out", "out.ckpt", "--allow", name)


def test_a_plan_says_what_would_happen_and_does_nothing(monkeypatch, capsys, places, tmp_path):
    before = sorted(tmp_path.iterdir())
    call(monkeypatch, "merge", *places, "--out", "out", "--plan")
    printed = capsys.readouterr().out
    assert "7 merged, 2 copied" in printed
    assert "MiB at most" in printed
    assert sorted(tmp_path.iterdir()) == before


def test_a_refusal_is_one_line_and_code_1(monkeypatch, places):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "merge", *places, "missing.ckpt", "--out", "out")
    assert str(caught.value.code).startswith("CheckpointError: missing.ckpt")


def test_the_linear_merge_of_mergekit_is_taken_as_it_is(monkeypatch, places, tmp_path):
    text = f"""
    merge_method: linear
    models:
      - {{model: {places[0]}, parameters: {{weight: 1.0}}}}
      - {{model: {places[2]}, parameters: {{weight: 3.0}}}}
    dtype: float32
    """
    (tmp_path / "mergekit.yaml").write_text(text)
    call(monkeypatch, "merge", "mergekit.yaml", "--out", "out")
    found, about = read("out")
    assert about["coefficients"] == [0.25, 0.75]
    assert found["a.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("merge_method: ties\nmodels: []", "'ties'"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "model"),
        ("merge_method: linear\nmodels: []\nslices: []", "slices"),
        ("[]", "None"),
    ],
)
def test_another_merge_of_mergekit_is_refused(tmp_path, text, piece):
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"merge\.yaml") as caught:
        read_mergekit(tmp_path / "merge.yaml", None)
    assert piece in str(caught.value)


def test_export_writes_what_it_names(monkeypatch, capsys, places):
    call(monkeypatch, "merge", *places, "--out", "merged")
    call(monkeypatch, "export", "merged", "--to", "safetensors", "--out", "plain")
    assert "Exported" in capsys.readouterr().out
    assert json.dumps(read("plain")[1]["sources"][0]["place"]) == '"merged"'


@pytest.mark.parametrize("option", ["newest", "average"])
def test_a_pattern_that_matches_no_tensor_is_refused_with_names_that_are_there(monkeypatch, places, option):
    said = rf"^ConfigError: {option}: '\*nothing\*' matches no tensor\. .*such as 'embed\.weight'"
    with pytest.raises(SystemExit, match=said):
        call(monkeypatch, "merge", *places, "--out", "out", f"--{option}", "*nothing*")


def test_counters_of_an_optimizer_are_not_counted_as_tensors_of_the_model(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    weights = {"a.weight": torch.ones(3)}
    named = [writers.lightning(tmp_path, step, weights, optimizer_states=[state]).name for step in (1, 2)]
    call(monkeypatch, "merge", *named, "--optimizer", "average", "--out", "out")
    assert "copied 0 (and 1 of the optimizer)" in capsys.readouterr().out
