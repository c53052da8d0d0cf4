"""What the demo says follows from the numbers."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain_merge.demo.report import comparison, forecasts, sentence, show, summarise
from pretrain_merge.records import Expected, MergeRecord


def record(step, raw, **views):
    return MergeRecord(
        name="merge",
        step=step,
        samples=16 * step,
        tokens=1024 * step,
        window=5,
        spread=0.1,
        raw={"val_loss": raw},
        views={view: {"val_loss": loss} for view, loss in views.items()},
    )


RECORDS = [
    record(100, 3.0),
    record(200, 2.5, sma=2.75, wsm=2.6),
    record(300, 2.25, sma=2.0, wsm=2.25),
    record(400, 2.0, sma=1.6, wsm=1.75),
]
CURVE = {300: 2.25, 350: 2.0, 400: 1.5}


def summary(records=RECORDS, curve=CURVE):
    about = {"model": "Llama", "parameters": 123_456, "seconds_train": 60.0, "seconds_anneal": 5.0}
    return summarise(records, curve, views=["sma", "wsm"], **about)


def test_the_gap_closed_is_the_share_of_the_way_from_raw_to_annealed():
    result = summary()
    assert (result.raw, result.annealed, result.steps, result.seconds) == (2.0, 1.5, 400, 65.0)
    assert result.merged == {"sma": 1.6, "wsm": 1.75}
    assert result.gap_closed == {"sma": pytest.approx(0.8), "wsm": pytest.approx(0.5)}
    assert result.best == "sma"
    assert result.anneal_steps == 100
    assert result.tokens == 409_600


def test_the_forecast_is_what_was_expected_where_the_branch_left_and_the_nowcast_at_its_end():
    ahead, now = Expected(1.52, 1.4, 1.6, step=400), Expected(1.6, 1.55, 1.65, step=400)
    records = [*RECORDS]
    records[2] = replace(records[2], forecasts={"ahead": {"val_loss": ahead}, "now": {"val_loss": now}})
    records[3] = replace(
        records[3], forecasts={"ahead": {"val_loss": replace(ahead, step=500)}, "now": {"val_loss": now}}
    )
    result = summary(records)
    assert (result.forecast, result.nowcast) == (ahead, now)
    first, second = forecasts(result).splitlines()
    for part in ("step 300", "1.5200", "1.4000 to 1.6000", "+1.33%", "1.5000", "holds it"):
        assert part in first
    assert "step 400" in second
    assert "does not hold it" in second


def test_a_run_without_forecasts_says_so():
    assert (summary().forecast, summary().nowcast) == (None, None)
    assert forecasts(summary()).count("none, the run is too short for one") == 2


def test_views_that_only_forecasts_needed_are_not_compared():
    assert summary([*RECORDS[:-1], record(400, 2.0, sma=1.6, sma3=1.0)]).merged == {"sma": 1.6}


def test_better_than_raw_counts_merge_points_past_the_first_quarter_and_a_tie_is_no_win():
    # past step 100: 200 (both worse), 300 (sma better, wsm equal), 400 (both better)
    assert summary().better_than_raw == {"sma": pytest.approx(2 / 3), "wsm": pytest.approx(1 / 3)}


@pytest.mark.parametrize("annealed", [2.0, 2.5, math.nan])
def test_without_a_gap_there_is_no_share_of_it(annealed):
    result = summary(curve={300: 2.25, 400: annealed})
    assert result.gap_closed == {"sma": None, "wsm": None}
    assert "gap closed –" in comparison(result)
    assert "did not tell" in sentence(result)


def test_the_sentence_and_the_comparison_quote_raw_merged_and_annealed():
    for text in (sentence(summary()), comparison(summary())):
        for part in ("1.6000", "2.0000", "1.5000", "80%", "sma"):
            assert part in text
    for part in ("123,456", "400 steps", "5 snapshots", "100 steps of real annealing"):
        assert part in sentence(summary())
    assert sentence(summary()).count(". ") == 0  # one sentence


def test_a_merge_that_is_worse_than_raw_is_not_praised():
    records = [*RECORDS[:-1], record(400, 2.0, sma=2.1, wsm=2.2)]
    text = sentence(summary(records))
    assert "did not tell" in text
    assert "of the way" not in text


def test_the_table_has_a_row_for_every_merge_and_the_gap_where_the_anneal_ended(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    show(RECORDS, summary(), Path("runs/[demo]"))
    out = capsys.readouterr().out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert list(rows) == ["100", "200", "300", "400"]
    assert rows["100"].count("–") == 2
    for part in ("2.0000", "1.6000", "1.7500", "-20.0%", "80%"):
        assert part in rows["400"]
    assert "80%" not in rows["300"]
    assert "+4.0%" in rows["200"]
    assert comparison(summary()) in out
    assert "runs/[demo]" in out
    assert "What you just saw" in out
