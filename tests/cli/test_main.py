"""The command line: what it prints, what it leaves, and how it refuses."""

import sys
from pathlib import Path

import pytest

from pretrain_merge.cli import main as cli
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import MergeRecord, append_record
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
