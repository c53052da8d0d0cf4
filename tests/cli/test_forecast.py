"""`pretrain-merge forecast`: a table, a fan chart and an answer, from each kind of file that a run leaves."""

import dataclasses
import json
import re
import shlex
import sys

import pytest
from forecast.synthetic import run as synthetic_run
from lightning.pytorch.loggers import CSVLogger

from pretrain_merge import forecast_anneal
from pretrain_merge.cli import main as cli
from pretrain_merge.cli.forecast import forecast
from pretrain_merge.errors import ConfigError, ForecastError
from pretrain_merge.forecast import Annealed, calibrate
from pretrain_merge.forecast.calibration import shipped
from pretrain_merge.records import append_record
from pretrain_merge.records.loggers import Tracker

RUN = synthetic_run(2000)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    for item in RUN:
        append_record(tmp_path / "run" / "merges.jsonl", item)
    return tmp_path / "run"


def cell(**options):
    answer = forecast_anneal(RUN, **options)
    return f"{answer.mean:.4f} ±{(answer.high - answer.low) / 2:.4f}"


def test_the_table_answers_both_questions_for_each_length(folder, capsys):
    forecast(folder)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows[:-2]] == ["100", "200", "300", "350", "400", "600"]
    assert cell(steps=200, kind="nowcast") in rows[1]
    assert cell(steps=200, kind="forecast") in rows[1]
    assert "2200" in rows[1]
    assert cell(steps=600, kind="forecast") in rows[5]
    assert "–" in rows[5].split()[3]  # the window does not reach so far back


def test_raw_and_the_best_merged_stand_below_as_reference(folder, capsys):
    forecast(folder)
    *_, raw, merged = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    newest = RUN[-1]
    best = min(newest.views, key=lambda view: newest.views[view]["val_loss"])
    assert raw[1:4] == ["raw", "│", f"{newest.raw['val_loss']:.4f}"]
    assert merged[1:5] == ["merged", f"({best})", "│", f"{newest.views[best]['val_loss']:.4f}"]


def test_a_sentence_says_whether_to_anneal_now_or_to_go_on_and_what_that_costs(folder, capsys):
    forecast(folder)
    said = " ".join(capsys.readouterr().out.split())
    now, later = (forecast_anneal(RUN, steps=200, after=after) for after in (0, 200))
    assert f"annealed from now over 200 steps, val_loss ends at {now.mean:.4f}" in said
    assert f"after 200 steps more at constant rate and the same anneal, at {later.mean:.4f}" in said
    assert f"at step 2400: {now.mean - later.mean:.4f}" in said
    assert "for 200 steps more" in said


def test_a_target_that_is_reached_already_is_said_to_be(folder, capsys):
    best = min(values["val_loss"] for values in RUN[-1].views.values())
    forecast(folder, target=best + 1e-3)
    said = " ".join(capsys.readouterr().out.split())
    assert "is reached already, without an anneal: merged (" in said
    assert "is expected after" not in said


def test_the_command_runs_as_a_user_types_it(folder, capsys, monkeypatch):
    command = ["pretrain-merge", "forecast", str(folder), "--steps", "[150]", "--shape", "cosine", "--coverage", "0.8"]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    out = capsys.readouterr().out
    assert cell(steps=150, kind="forecast", shape="cosine", coverage=0.8) in out
    assert "with 80% intervals" in out
    assert f"{shipped().num_runs} runs" in out
    assert (folder / "forecast.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_bears_the_name_of_the_run(folder, monkeypatch):
    titles = []
    monkeypatch.setattr("pretrain_merge.records.plots.save", lambda figure, path: titles.append(figure.axes[0]))
    forecast(folder, steps=200)
    assert titles[0].get_title(loc="left") == f"{folder.parent.name}/{folder.name}"


def test_the_numbers_go_to_a_file(folder, tmp_path):
    forecast(folder, steps=[200], json=tmp_path / "numbers.json")
    back, ahead = json.loads((tmp_path / "numbers.json").read_text())
    assert (back["kind"], ahead["kind"]) == ("nowcast", "forecast")
    assert ahead["mean"] == forecast_anneal(RUN, steps=200).mean


def test_a_csv_forecasts_what_the_records_do(folder, tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    for item in RUN:
        Tracker().publish([logger], item)
    forecast(tmp_path / "lightning_logs" / "version_0", steps=[200], every=50)
    assert cell(steps=200, kind="forecast") in capsys.readouterr().out


def test_a_target_is_answered_in_steps_of_annealing(folder, capsys):
    longest = forecast_anneal(RUN, steps=600)
    forecast(folder, target=longest.mean + 0.002)
    said = " ".join(capsys.readouterr().out.split())
    assert "is expected after" in said
    assert "steps of annealing from here, at step" in said
    forecast(folder, target=0.5)
    said = " ".join(capsys.readouterr().out.split())
    assert "0.5 is not reached by an anneal from here" in said
    assert f"{longest.mean:.4f}" in said


def test_a_calibration_of_ones_own_is_used(folder, tmp_path, capsys):
    own = calibrate(RUN, [Annealed(start=1700, steps=300, loss=1.9)])
    own.save(tmp_path / "own.json")
    forecast(folder, steps=[200], calibration=tmp_path / "own.json")
    assert cell(steps=200, kind="forecast", calibration=own) in capsys.readouterr().out


def test_if_nothing_can_be_answered_the_reasons_are_the_error(folder):
    with pytest.raises(ForecastError, match=r"was not measured"):
        forecast(folder, metric="other")


def test_a_csv_whose_file_says_the_interval_needs_no_option_and_says_what_it_lacks(folder, tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    for item in RUN:
        Tracker().publish([logger], item)
    forecast(tmp_path / "lightning_logs" / "version_0", steps=[200])
    said = capsys.readouterr().out
    assert cell(steps=200, kind="forecast") in said
    assert "the file holds no learning rates" in " ".join(said.split())
    forecast(folder, steps=[200])
    assert "holds no learning rates" not in capsys.readouterr().out


@pytest.mark.parametrize("target", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_target_that_no_loss_reaches_is_refused(folder, target):
    with pytest.raises(ConfigError, match=r"target: .* is not a loss to reach\. Allowed: a number above 0"):
        forecast(folder, target=target)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--steps", "200", "--steps", "300"], (200, 300)),
        (["--steps", "10%", "--steps=15%"], (200, 300)),
        (["--steps", "200 steps"], (200,)),
        (["--steps", "[200, 10%]"], (200,)),
    ],
)
def test_lengths_are_numbers_or_shares_of_the_steps_so_far_as_often_as_there_are(
    folder, capsys, monkeypatch, words, steps
):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", "forecast", str(folder), *words])
    cli.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows[:-2]] == [str(length) for length in steps]


@pytest.mark.parametrize("word", ["0", "-3", "nan", "abc", "0%", "200%", "1e99", "", "8B tokens"])
def test_a_length_that_is_none_is_refused_by_its_option(folder, monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", "forecast", str(folder), f"--steps={word}"])
    with pytest.raises(SystemExit, match=r"^ConfigError: steps: "):
        cli.main()


@pytest.mark.parametrize("word", ["0", "-5", "nan"])
def test_a_length_that_is_none_is_told_that_a_share_is_one(folder, monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", "forecast", str(folder), f"--steps={word}"])
    with pytest.raises(SystemExit, match=r"is not a quantity.*'10%'"):
        cli.main()


@pytest.mark.parametrize("word", ["nan", "abc", "0", "-1"])
def test_a_target_that_the_command_line_cannot_read_is_refused_in_our_words(folder, monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["pretrain-merge", "forecast", str(folder), f"--target={word}"])
    with pytest.raises(SystemExit, match=rf"^ConfigError: target: {word}(\.0)? is not a loss to reach"):
        cli.main()


def of_metrics(folder, **values):
    for item in RUN:
        named = {name: item.raw["val_loss"] * value for name, value in values.items()}
        views = dict.fromkeys(item.views, named)
        append_record(folder / "merges.jsonl", dataclasses.replace(item, raw=named, views=views))
    return folder


def test_of_several_losses_the_remedy_that_is_named_works(tmp_path, capsys):
    run = of_metrics(tmp_path, **{"lm loss": 1.0, "aux_loss": 0.1})
    with pytest.raises(ForecastError) as caught:
        forecast(run)
    remedy = re.search(r"\((--metric .*?) on the command line\)", str(caught.value))[1]
    assert shlex.split(remedy) == ["--metric", "lm loss"]
    forecast(run, metric="lm loss")
    assert "lm loss after" in capsys.readouterr().out


def test_a_run_that_ended_after_one_merge_is_told_more_than_to_wait(tmp_path):
    append_record(tmp_path / "merges.jsonl", RUN[-1])
    with pytest.raises(ForecastError, match=r"Wait for more\. A run that has ended needs a shorter `every`"):
        forecast(tmp_path)


def test_a_run_without_a_loss_is_told_to_log_one(tmp_path):
    with pytest.raises(ForecastError, match=r"measured is val_acc, and a forecast is of a loss.*self\.log\('val_loss'"):
        forecast(of_metrics(tmp_path, val_acc=0.1))


def test_a_reason_to_widen_is_said_once_with_each_lengths_factor(folder, capsys):
    forecast(folder, steps=[700, 800])
    said = " ".join(capsys.readouterr().out.split()).split("interval widened")[1:]
    assert sum("being outside of the lengths calibrated on" in line for line in said) == 1
    assert re.search(r"\(.*forecast 700: [0-9.]+ times, forecast 800: [0-9.]+ times\)", said[0])
