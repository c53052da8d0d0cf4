"""The command line: what it prints, what it leaves, and how it refuses."""

import itertools
import os
import sys
from pathlib import Path

import pytest

import pretrain_merge
from pretrain_merge.cli import main as cli
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import MergeRecord, Recipe, append_record, tables
from pretrain_merge.records.tables import merges_table


def record(step, raw, **views):
    measured = {view: {"val_loss": value} for view, value in views.items()}
    return MergeRecord("merge", step, 0, 0, 4, 0.01, {"val_loss": raw}, measured)


@pytest.fixture
def run(tmp_path):
    append_record(tmp_path / "merges.jsonl", record(100, 2.0, sma=2.1))
    append_record(tmp_path / "merges.jsonl", record(200, 1.8, sma=1.7, sma4=1.75))
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", *map(str, arguments)])
    cli.main()


def test_report_prints_every_merge_and_draws_the_curves(monkeypatch, capsys, run):
    call(monkeypatch, "report", run)
    printed = capsys.readouterr().out
    assert "1.7000" in printed
    assert "-5.6%" in printed  # 1.7 / 1.8 - 1
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_takes_the_file_and_another_place_for_the_picture(monkeypatch, run, tmp_path):
    call(monkeypatch, "report", run / "merges.jsonl", "--picture", tmp_path / "here.png")
    assert (tmp_path / "here.png").exists()
    assert not (run / "report.png").exists()


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [(["report", "no-such-run"], "no-such-run"), (["report", "{run}", "--metric", "val_acc"], "Measured: val_loss")],
)
def test_an_error_of_ours_ends_with_its_message_and_code_1(monkeypatch, run, arguments, piece):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *(argument.format(run=run) for argument in arguments))
    assert piece in str(caught.value.code)


def test_demo_hands_its_arguments_on(monkeypatch, tmp_path):
    import pretrain_merge.demo.run as run_module

    seen = {}
    monkeypatch.setattr(run_module, "demo", lambda experiment, *, out: seen.update(experiment=experiment, out=out))
    call(monkeypatch, "demo", "--model", "moe", "--seed", "3", "--out", tmp_path)
    assert (seen["experiment"].family, seen["experiment"].seed, seen["out"]) == ("moe", 3, Path(tmp_path))


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "report", "anywhere")
    assert "pip install 'pretrain-merge[cli]'" in str(caught.value.code)


def test_a_view_that_was_skipped_leaves_a_dash(run):
    table = merges_table([record(100, 2.0), record(200, 1.8, sma=1.7)], "val_loss")
    assert next(iter(table.columns[2].cells)) == "–"


def test_a_table_of_a_metric_that_nobody_measured_is_refused():
    with pytest.raises(ConfigError, match="Measured: val_loss"):
        merges_table([record(100, 2.0)], "accuracy")


def long_run(folder, number=500, best=333, **changes):
    path = folder / "merges.jsonl"
    path.write_text(
        "".join(
            record(step, 2.0, sma=1.0 if step == best else 1.9, **changes).to_json() + "\n"
            for step in range(1, number + 1)
        )
    )
    return path


def printed_steps(text):
    return [int(line.split("│")[1]) for line in text.splitlines() if line.startswith("│")]


def test_a_report_of_a_long_run_shows_some_rows_with_the_first_the_best_and_the_last(monkeypatch, capsys, tmp_path):
    long_run(tmp_path)
    call(monkeypatch, "report", tmp_path)
    printed = capsys.readouterr().out
    steps = printed_steps(printed)
    assert len(steps) <= 40
    assert {1, 333, 500} <= set(steps)
    assert max(after - before for before, after in itertools.pairwise(steps)) < 25
    assert f"{len(steps)} of 500 merges; --all" in printed
    call(monkeypatch, "report", tmp_path, "--all", "true")
    assert printed_steps(capsys.readouterr().out) == list(range(1, 501))


def test_a_table_of_a_long_run_makes_cells_of_the_rows_that_it_shows(monkeypatch):
    cells = []
    cell = tables._cell
    monkeypatch.setattr(tables, "_cell", lambda *given, **options: cells.append(given) or cell(*given, **options))
    merges_table([record(step, 2.0, sma=1.9) for step in range(1, 2001)], "val_loss", at_most=30)
    assert len(cells) <= 30


@pytest.mark.parametrize(("metric", "mode", "best"), [("val_acc", None, "+10.0%"), ("val_acc", "min", "-20.0%")])
def test_the_best_view_is_the_largest_of_a_metric_that_should_be_large(metric, mode, best):
    measured = MergeRecord("merge", 1, 0, 0, 4, 0.1, {metric: 0.5}, {"sma": {metric: 0.55}, "sma4": {metric: 0.4}})
    table = merges_table([measured], metric, mode=mode)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[-1] == best
    assert ("bold green" in cells[2]) == (mode is None)
    assert ("red" in cells[3]) == (mode is None)


def test_a_metric_below_0_that_falls_has_fallen():
    measured = MergeRecord("merge", 1, 0, 0, 4, 0.1, {"val_loss": -2.0}, {"sma": {"val_loss": -2.5}})
    table = merges_table([measured], "val_loss")
    assert [next(iter(column.cells)) for column in table.columns][2:] == ["[bold green]-2.5000[/]", "-25.0%"]


def test_a_view_that_is_not_a_number_is_never_the_best():
    nan = float("nan")
    table = merges_table([record(1, 2.0, sma=nan, sma4=2.1), record(2, 2.0, sma=nan)], "val_loss")
    assert [next(iter(column.cells)) for column in table.columns][2:] == ["[red]nan[/]", "[red]2.1000[/]", "+5.0%"]
    assert list(table.columns[-1].cells)[1] == ""


@pytest.mark.parametrize(
    ("measured", "shown", "others"),
    [
        ({"val_acc": 0.5}, "val_acc", ""),
        ({"acc": 0.5, "val/loss": 2.0, "f1": 0.4}, "val/loss", "acc, f1"),
        ({"lm_loss": 2.0, "aux_loss": 1.0}, "lm_loss", "aux_loss"),
    ],
)
def test_a_report_shows_the_loss_or_what_there_is_and_names_others(monkeypatch, capsys, run, measured, shown, others):
    (run / "merges.jsonl").unlink()
    append_record(run / "merges.jsonl", MergeRecord("merge", 10, 0, 0, 4, 0.1, measured, {"sma": measured}))
    call(monkeypatch, "report", run)
    printed = capsys.readouterr().out
    assert f"{measured[shown]:.4f}" in printed
    assert (f"Shown is {shown}. --metric shows another one: {others}." in printed) == bool(others)


def test_a_report_reads_what_a_logger_wrote(monkeypatch, capsys, tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,merge/step,merge/raw/val_loss,merge/sma/val_loss,merge/window\n9,10,2.0,1.9,2\n19,20,1.8,1.7,3\n"
    )
    call(monkeypatch, "report", tmp_path)
    assert "1.7000" in capsys.readouterr().out
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("option", ["--picture", "--html", "--json"])
def test_a_folder_is_no_place_for_a_result(monkeypatch, run, option):
    monkeypatch.chdir(run)
    with pytest.raises(SystemExit, match=r"^CheckpointError: cannot write \.: Is a directory\. Name a file"):
        call(monkeypatch, "report", run, option, ".")


@pytest.mark.parametrize("command", ["report", "forecast"])
def test_a_run_without_a_merge_says_so(monkeypatch, tmp_path, command):
    (tmp_path / "merges.jsonl").touch()
    with pytest.raises(SystemExit, match=r"holds no merge yet\. Wait for the first"):
        call(monkeypatch, command, tmp_path)


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"pretrain-merge {pretrain_merge.__version__}"


@pytest.fixture
def run_to_forecast(tmp_path):
    """Eight merges with means over one and three intervals."""
    for step in range(100, 801, 100):
        taken = {f"sma{n}": tuple(step - 10 * back for back in reversed(range(n))) for n in (2, 4)}
        recipes = {view: Recipe(steps, (1 / len(steps),) * len(steps)) for view, steps in taken.items()}
        means = {view: {"val_loss": 1.9 - step / 10_000} for view in taken}
        raw = {"val_loss": 2.0 - step / 10_000}
        append_record(tmp_path / "merges.jsonl", MergeRecord("merge", step, 0, 0, 4, 0.1, raw, means, recipes))
    return tmp_path


@pytest.mark.parametrize("command", [["report", "--picture"], ["forecast", "--steps", "[30]", "--json"]])
def test_a_place_that_cannot_be_written_is_an_error_of_ours(monkeypatch, run_to_forecast, command):
    name, *options = command
    told = r"^CheckpointError: cannot write .*/such\.png: No such file or directory\. .*in a folder that can be written"
    with pytest.raises(SystemExit, match=told):
        call(monkeypatch, name, run_to_forecast, *options, run_to_forecast / "no" / "such.png")


@pytest.mark.parametrize("arguments", [["report", "{run}", "--json", "-"], ["--help"]])
def test_a_reader_who_leaves_ends_a_command_quietly(monkeypatch, run, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as caught:
            call(monkeypatch, *(argument.format(run=run) for argument in arguments))
    assert caught.value.code == 1


def test_a_broken_pipe_that_is_not_standard_output_keeps_its_traceback(monkeypatch, run):
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(BrokenPipeError):
        call(monkeypatch, "report", run)
