"""The command `plan`: what it prints and writes is what the arithmetic gives for the options."""

import json
import sys

import pytest

from pretrain_merge.cadence import Quantity
from pretrain_merge.cli import main as cli
from pretrain_merge.cli.plan_table import plan_table
from pretrain_merge.config import MergeConfig, build
from pretrain_merge.errors import MissingDependencyError
from pretrain_merge.plan import HARDWARE, Layout, Measured, Merging, Model, Question, Training, make_plan


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command; returns what it printed."""

    def run(*arguments, columns=140):
        monkeypatch.setattr(sys, "argv", ["pretrain-merge", "plan", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        cli.main()
        return capsys.readouterr().out

    return run


def test_the_table_shows_each_figure_with_its_arithmetic(call):
    printed = call("7B", "--gpus", 8)
    for row in (
        r"window 35 GB 10 × 3.5 GB",
        r"parameters 875,000,000 7B / 8, rows rounded up",
        r"device 35 GB of 66 GB fits; of 80 GB less 4 × parameters × 4 bytes of training",
        r"a step of training 53.1 s 6 × 7B × 4M tokens / (8 × 989 TFLOPS × 40%)",
        r"a merged model 28 GB 7B × 4 bytes",
        r"interpolated between dense 2B and 8B of PMA, arXiv 2505.12082",
    ):
        assert row in " ".join(printed.split())


def test_restart_points_are_counted_where_they_are_asked_for(call):
    printed = " ".join(call("7B", "--gpus", 8, "--restart_points", 3).split())
    assert "restart points 10.5 GB 3 × parameters × 4 bytes, on the host" in printed


def test_json_holds_the_question_and_the_plan(call, tmp_path):
    path = tmp_path / "plan.json"
    call(
        "100B", "--activated", "10B", "--gpus", 32, "--replicate", 2, "--tensor", 4, "--hardware", "a100", "--dtype",
        "float32", "--slot_dtype", "bfloat16", "--window", 6, "--every", "8B tokens", "--merge_every", "16B tokens",
        "--views", "[sma,sma4]", "--average", "block", "--sample_every", 5, "--store", "disk", "--tokens_per_step",
        "2M tokens", "--validation_tokens", "1M", "--step_seconds", 12.5, "--measured.disk_rate", 1e9, "--json", path,
    )  # fmt: skip
    written = json.loads(path.read_text())
    merging = Merging(
        Quantity(8 * 10**9, "tokens"), Quantity(16 * 10**9, "tokens"), window=6, views=(6, 4), average="block",
        sample_every=5, store="disk", itemsize=4, slot_itemsize=2,
    )  # fmt: skip
    expected = make_plan(
        Question(
            Model("100B", ((100 * 10**9, 1),), 10 * 10**9),
            Layout(shard=4, replicate=2, tensor=4),
            Measured(disk_rate=1e9).over(HARDWARE["a100"]),
            merging,
            Training(2 * 10**6, 10**6, step_seconds=12.5),
        )
    )
    figures = written["plan"]
    for name in ("window_bytes", "scratch_bytes", "accumulator_bytes", "slot_file_bytes_per_host", "share", "store"):
        assert figures[name] == getattr(expected, name)
    assert {name: cost["share"] for name, cost in figures["costs"].items()} == {
        name: cost.share for name, cost in expected.costs.items()
    }
    assert figures["places"]["disk"]["fits"] is expected.places["disk"].fits
    assert written["model"] == {"source": "100B", "parameters": 100 * 10**9, "activated": 10 * 10**9}
    assert written["layout"] == {"shard": 4, "replicate": 2, "tensor": 4}
    assert written["paper"]["interval"] == 80 * 10**9


def test_interval_and_window_are_the_papers_where_nothing_else_is_said(call, tmp_path):
    call("70B", "--gpus", 64, "--json", tmp_path / "plan.json")
    merging = json.loads((tmp_path / "plan.json").read_text())["merging"]
    assert (merging["every"], merging["window"]) == ({"amount": 40 * 10**9, "unit": "tokens"}, 10)


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["7B", "--gpus", 8, "--shard", 3], "gpus: 8 ranks, and shard 3 × replicate 1 × tensor 1 are 3"),
        (["7B", "--gpus", 6, "--tensor", 4], "gpus: 6 ranks"),
        (["7B", "--replicate", 0], "replicate: 0 ranks"),
        (["7B", "--views", "[sma12]"], "the window holds 10"),
        (["7B", "--every", "3 fortnights"], "every: '3 fortnights' is not a quantity"),
        (["7B", "--every", "3 samples"], "every: 3 samples"),
        (["7B", "--tokens_per_step", "lots"], "tokens_per_step: 'lots' is not a quantity"),
        (["7B", "--validation_tokens", "3 samples"], "validation_tokens: '3 samples' is not a number of tokens"),
        (["7B", "--tokens_per_step", "9 steps"], "tokens_per_step: '9 steps' is not a number of tokens"),
        (["seven"], "model: 'seven'"),
    ],
)
def test_an_impossible_option_ends_with_its_message(call, arguments, piece):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert piece in str(caught.value.code)


def test_what_does_not_fit_is_said(call):
    assert "too large" in call("70B", "--gpus", 1)
    assert "too large" not in call("1B", "--gpus", 8)


def test_a_table_without_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pretrain-merge\[cli\]'"):
        plan_table(None, None, None)


def test_the_configuration_that_was_planned_is_printed_to_be_pasted(call, tmp_path):
    printed = call("7B", "--window", 6, "--every", "8B tokens", "--views", "[sma,sma4]", "--store", "disk")
    path = tmp_path / "merge.yaml"
    path.write_text(printed[printed.index("# the callback's configuration") :])
    assert 'every: "13B tokens"' in call("7B")  # the paper's, as people write it
    config = build(MergeConfig, path)
    assert (config.window, config.every, config.views, config.store) == (6, "8B tokens", ["sma", "sma4"], "disk")
    assert "average" not in path.read_text()


def test_at_80_columns_what_goes_on_in_a_second_line_stays_in_its_section(call):
    lines = call("7B", "--gpus", 8, columns=80).splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("   copy of raw in an ")]
    assert lines[place + 1].startswith("   evaluation ")


def test_the_tokens_of_a_run_say_how_many_merges_it_makes_and_what_a_window_spans(call):
    printed = " ".join(call("7B", "--window", 11, "--every", "8B tokens", "--total_tokens", "2T").split())
    for row in (
        "with save_top_k=-1, at most 7 TB 250 snapshots in the run; keep_windows bounds it",
        "snapshots in the run 250 2T tokens / interval",
        "merges in the run 249",
        "a window spans 4.0%",
    ):
        assert row in printed


def test_json_to_standard_output_stands_alone(call, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", "plan", "7B", "--json", "-"])
    cli.main()
    printed, beside = capsys.readouterr()
    assert json.loads(printed)["model"]["parameters"] == 7 * 10**9
    assert "window" in beside
