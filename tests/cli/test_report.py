"""`pretrain-merge report`: one run or several, to a terminal of any width, a picture, a page and JSON."""

import json
import re
import sys

import pytest
from forecast.synthetic import run as synthetic_run
from harness.records import at, falling_run

from pretrain_merge.cli import main as cli
from pretrain_merge.errors import CheckpointError
from pretrain_merge.records import append_record


def written(folder, records):
    for record in records:
        append_record(folder / "merges.jsonl", record)
    return folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", *map(str, arguments)])
    cli.main()


def many_views(step, number=9):
    return at(step, views={f"a-long-name-{index}": {"val_loss": 1.9 - 0.01 * index} for index in range(number)})


def test_a_narrow_terminal_shows_the_best_views_whole_and_names_the_others(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    call(monkeypatch, "report", written(tmp_path, [many_views(100), many_views(200)]))
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table)
    assert "a-long-name-8" in table[2] or "a-long-name-8" in table[1]
    assert re.search(r"No room for a-long-name-0,.*; best vs raw is of all", printed)


def test_best_vs_raw_is_of_all_views_also_of_those_without_room(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    first = at(100, views={"a-long-name-0": {"val_loss": 1.0}})
    call(monkeypatch, "report", written(tmp_path, [first, many_views(200)]))
    assert "-50.0%" in capsys.readouterr().out


def test_several_runs_are_told_apart_by_the_ends_of_their_paths(monkeypatch, capsys, tmp_path):
    runs = [written(tmp_path / name / "version_0", falling_run(3)) for name in ("one", "two")]
    call(monkeypatch, "report", *runs, "--json", "-")
    printed = capsys.readouterr()
    assert [run["run"] for run in json.loads(printed.out)] == ["one/version_0", "two/version_0"]
    assert "one/version_0" in printed.err
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(SystemExit, match="picture: is of one run"):
        call(monkeypatch, "report", *runs, "--picture", tmp_path / "a.png")


def test_of_several_runs_those_without_a_merge_are_left_out_with_the_reason(monkeypatch, capsys, tmp_path):
    runs = [written(tmp_path / "one" / "version_0", falling_run(3)), tmp_path / "two" / "version_0"]
    runs[1].mkdir(parents=True)
    (runs[1] / "merges.run.json").touch()
    call(monkeypatch, "report", *runs)
    printed = capsys.readouterr().out
    assert "Left out: " in printed
    assert "is of a run that has not merged" in printed
    with pytest.raises(SystemExit, match="is of a run that has not merged"):
        call(monkeypatch, "report", runs[1], runs[1])


def test_runs_that_measured_different_things_are_told_apart_before_anything_is_shown(monkeypatch, capsys, tmp_path):
    runs = [
        written(tmp_path / metric / "run", [at(100, raw={metric: 2.0, "val_f1": 1.0}, views={})])
        for metric in ("val_loss", "val_acc")
    ]
    call(monkeypatch, "report", *runs)
    assert "Shown" not in capsys.readouterr().out  # val_f1, which both have
    with pytest.raises(SystemExit, match=r"'val_acc' was not measured by all 2 runs.*Of these --metric takes val_f1"):
        call(monkeypatch, "report", *runs, "--metric", "val_acc")
    assert capsys.readouterr().out == ""


def test_json_has_the_records_as_they_are(monkeypatch, capsys, tmp_path):
    call(monkeypatch, "report", written(tmp_path, falling_run(3)), "--json", "-")
    (run,) = json.loads(capsys.readouterr().out)
    assert run["records"] == [json.loads(record.to_json()) for record in falling_run(3)]


def test_a_page_has_configuration_and_files_of_the_runs_folder(monkeypatch, capsys, tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'pretrain-merge[report]'")
    (written(tmp_path / "run", falling_run(3)) / "merges.config.yaml").write_text("window: 4  # mine\n")
    call(monkeypatch, "report", tmp_path / "run", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<pre>window: 4  # mine\n</pre>" in page
    assert '<a href="./run/merges.jsonl">merges.jsonl</a>' in page
    assert f"Page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^CheckpointError: cannot write .*in a folder that can be written"):
        call(monkeypatch, "report", tmp_path / "run", "--html", tmp_path / "no" / "such.html")


def test_without_matplotlib_the_table_is_printed_all_the_same(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    call(monkeypatch, "report", written(tmp_path, falling_run(3)))
    printed = capsys.readouterr().out
    assert "2.1333" in printed
    assert "No picture: Figures are drawn with matplotlib" in printed
    with pytest.raises(SystemExit, match="matplotlib, which is not installed"):
        call(monkeypatch, "report", tmp_path, "--picture", tmp_path / "a.png")


@pytest.mark.parametrize("command", [["report", "--json"], ["forecast", "--steps", "300", "--json"]])
def test_the_run_of_somebody_else_is_read_without_a_picture_in_its_folder(monkeypatch, capsys, tmp_path, command):
    def refuse(figure, path):
        raise CheckpointError(f"cannot write {path}: Permission denied.")

    monkeypatch.setattr("pretrain_merge.records.plots.save", refuse)
    name, *options = command
    call(monkeypatch, name, written(tmp_path, synthetic_run(2000)), *options, "-")
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert "No picture: cannot write" in printed.err
    with pytest.raises(SystemExit, match="Permission denied"):
        call(monkeypatch, name, tmp_path, *options, "-", "--picture", tmp_path / "a.png")


def test_a_view_of_a_project_needs_no_network_to_be_looked_at(monkeypatch, capsys, tmp_path):
    pytest.importorskip("wandb_workspaces", reason="not installed: pip install 'pretrain-merge[wandb-view]'")
    monkeypatch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
    run = written(tmp_path, falling_run(4))
    call(monkeypatch, "wandb-view", "us/tests", "--like", run, "--runs", "3xk2a9", "--json", "-")
    printed = capsys.readouterr().out
    assert "merge/sma2/val_loss" in printed
    assert json.loads(printed)["section"]["runSets"][0]["filters"]["filters"][0]["value"] == ["3xk2a9"]
    with pytest.raises(SystemExit, match="project: 'tests' is not a project"):
        call(monkeypatch, "wandb-view", "tests", "--json", "-")
