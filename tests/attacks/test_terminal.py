"""Names from files on their way to a terminal and into a picture: shown as they are, never obeyed."""

import json
import logging
import sys

import pytest

from pretrain_merge.cli import main
from pretrain_merge.errors import CheckpointError, RankError
from pretrain_merge.records import Expected, MergeRecord, append_record, plots
from pretrain_merge.runtime.log import logger

EVIL = "a\x1b[2J\x1b]0;x\x07\x9b5m[bold red]b[/][/]\u202e$\\frac{$c"


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30):
        views = {f"sma{EVIL}": {EVIL: 0.9}, "[/nothing]": {EVIL: 0.8}, "_hidden": {EVIL: 0.7}}
        forecasts = {EVIL: {EVIL: Expected(0.5, 0.4, 0.6, step + 10)}}
        record = MergeRecord("merge", step, step, 0, 2, 0.1, {EVIL: 1.0 / step}, views, forecasts=forecasts)
        append_record(tmp_path / "merges.jsonl", record)
    return tmp_path


def is_tame(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def called(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", *arguments])
    try:
        main.main()
    except SystemExit as end:
        return str(end.code)
    return capsys.readouterr().out


def test_a_report_shows_names_that_look_like_commands_and_markup(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    out = called(monkeypatch, capsys, "report", str(run), "--metric", EVIL)
    assert is_tame(out)
    assert r"sma" + r"a\x1b[2J" in out
    assert "[/nothing]" in out
    assert (run / "report.png").stat().st_size > 1000


def test_an_error_that_quotes_a_file_is_tame(run, monkeypatch, capsys):
    assert is_tame(called(monkeypatch, capsys, "report", str(run), "--metric", "other"))
    (run / "merges.jsonl").write_text(json.dumps({EVIL: 1}) + "\n")
    out = called(monkeypatch, capsys, "report", str(run))
    assert is_tame(out)
    assert "is not a merge record" in out or "is no merge record" in out


@pytest.mark.parametrize("name", ["[bold]", "a\x1b[2J", "$x$", "n" * 120])
def test_odd_names_of_folders_are_shown_as_they_are(name, run, monkeypatch, capsys):
    folder = run.rename(run.with_name(name))
    out = called(monkeypatch, capsys, "report", str(folder), "--metric", EVIL)
    assert is_tame(out)
    assert (folder / "report.png").exists()


def test_an_error_of_ours_has_no_control_characters_whichever_it_is():
    for kind in (CheckpointError, RankError):
        error = kind(f"cannot read {EVIL}\nsecond line \udc80")
        assert is_tame(str(error))
        assert "second line" in str(error)
    assert len(str(RankError("x" * 10**7))) < 20_000


def test_a_notice_has_no_control_characters(caplog):
    with caplog.at_level(logging.WARNING, logger="pretrain_merge"):
        logger.warning("left out: %s", EVIL)
    assert is_tame(caplog.text)


def test_a_picture_shows_formulas_as_text_and_numbers_of_any_size(tmp_path):
    records = [
        MergeRecord("merge", step, 0, 0, 2, 0.1, {EVIL: value}, {EVIL: {EVIL: -value}})
        for step, value in ((1, 1e308), (2, -1e308), (2**62, 5e-324))
    ]
    plots.save(plots.curves(records, metric=EVIL), tmp_path / "a.svg")
    assert "\x1b" not in (tmp_path / "a.svg").read_text()
