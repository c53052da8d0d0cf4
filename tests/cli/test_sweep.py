"""The command `sweep`: its words, and what it says in the end."""

import json
import math
import sys

import pytest
import torch
from offline import writers

from pretrain_merge.cli.main import main
from pretrain_merge.cli.sweep import _verdict
from pretrain_merge.offline.comparison import Comparison, Difference
from pretrain_merge.records import read_records


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for step in (100, 200, 300, 400):
        writers.safetensors_file(tmp_path, step, {"w": torch.tensor([1.0 + 10 / step])})

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pretrain-merge", *arguments])
        main()

    return run


def test_a_sweep_leaves_a_run_and_names_the_best_view(call, tmp_path, capsys):
    script = """
import json, struct, sys
print(json.dumps({"val_loss": struct.unpack("<f", open(sys.argv[1] + "/model.safetensors", "rb").read()[-4:])[0]}))
"""
    (tmp_path / "evaluate.py").write_text(script)
    command = f"{sys.executable} -S evaluate.py"
    call(
        "sweep",
        ".",
        "--evaluate",
        command,
        "--out",
        "swept",
        "--views",
        "[sma, sma2]",
        "--span",
        "null",
        "--intervals",
        "[1]",
    )
    printed = capsys.readouterr().out
    assert "Best: sma2, whose val_loss is 0.0125 ±" in printed
    assert "worse than raw" in printed
    assert "better than sma, the next one" in printed
    assert "pretrain-merge forecast swept" in printed
    assert [record.step for record in read_records(tmp_path / "swept/merges.jsonl")] == [200, 300, 400]
    assert json.loads((tmp_path / "swept/sweep.json").read_text())["best"] == "sma2"


def test_a_table_fits_the_terminal_and_the_report_that_shows_the_rest_is_named(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "evaluate.py").write_text("print('{\"val_loss\": 1.0}')")
    views = ", ".join(f"{{name: a-rather-long-name-{index}, kind: sma, last: {index + 2}}}" for index in range(3))
    call(
        "sweep", ".", "--evaluate", f"{sys.executable} -S evaluate.py", "--out", "swept", "--views", f"[{views}]",
        "--intervals", "1", "--merge-every", "400",
    )  # fmt: skip
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table)
    assert "No room for a-rather-long-name-" in printed
    assert "of 1 merge point." in printed
    assert "pretrain-merge report swept --html swept.html shows them" in printed


def test_a_plan_evaluates_nothing(call, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    call("sweep", ".", "--evaluate", "not-there", "--out", "swept", "--plan")
    printed = capsys.readouterr().out
    assert "checkpoints  4" in printed
    assert "sma2-every2" in printed
    assert sorted(tmp_path.iterdir()) == before


def test_a_refusal_is_one_line_and_code_1(call):
    with pytest.raises(SystemExit) as caught:
        call("sweep", ".", "--evaluate", "not-there", "--out", "swept")
    assert str(caught.value.code).startswith("EvaluationError: not-there")


@pytest.mark.parametrize(
    ("margin", "words"),
    [
        (Difference(0.02, 0.004, 9), "0.02 ± 0.004 better than b, the next one, 5.0 standard errors."),
        (Difference(0.002, 0.004, 9), "0.5 standard errors. The two are not told apart."),
        (Difference(0.002, math.nan, 2), "0.002 better than b, the next one. The two are not told apart."),
    ],
)
def test_the_verdict_says_how_sure_it_is(margin, words):
    gains = {"a": Difference(0.1, 0.01, 9), "b": Difference(0.08, 0.01, 9)}
    lines = _verdict(Comparison("val_loss", "a", gains, "b", margin))
    assert lines[0].startswith(
        "Best: a, whose val_loss is 0.1 ± 0.01 better than raw on average of 9 merge points, 10.0"
    )
    assert lines[1].endswith(words)


def test_a_program_that_fails_without_a_word_is_said_to_have_said_nothing(call):
    with pytest.raises(SystemExit, match=r"ended with code 1: it said nothing\. Run it by hand"):
        call("sweep", ".", "--evaluate", "false", "--out", "swept")


def test_a_pattern_that_matches_no_tensor_is_refused_before_anything_is_evaluated(call):
    with pytest.raises(SystemExit, match=r"newest: '\*nothing\*' matches no tensor.*'w'"):
        call("sweep", ".", "--evaluate", "not-there", "--out", "swept", "--newest", "*nothing*")


def test_a_view_that_was_left_out_is_named():
    gains = {"a": Difference(0.1, 0.01, 9)}
    compared = Comparison("val_loss", "a", gains, "", Difference(math.nan, math.nan, 0), ("sma10",))
    assert _verdict(compared)[-1] == "Not compared, being made at too few merge points: sma10."
