"""The page of a report: whole, without a network, true to the records, and safe whatever the records have as names."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess

import pytest
from harness.records import at, falling_run

from pretrain_merge.errors import ConfigError, MissingDependencyError
from pretrain_merge.records import Expected, Recipe
from pretrain_merge.records.disk_use import disk_use
from pretrain_merge.records.report import page
from pretrain_merge.records.report_sections import Reported

EVIL = (
    '</script><script>document.title="pwned"</script><img src=x onerror=\'document.title="pwned"\'>'
    '"><svg onload="document.title=1"> {{plotly}} ${1 + 1} <b>bold</b> \x1b[2J'
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def chart_library():
    pytest.importorskip("plotly", reason="plotly is not installed: pip install 'pretrain-merge[report]'")


def data_of(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def tables_of(text):
    """Rows of each table as lists of texts, the head first."""
    found = re.findall(r"<table>(.*?)</table>", text, re.S)
    cells = [
        [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", item)] for item in found
    ]
    return [[[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in rows] for rows in cells]


def evil_run():
    records = falling_run(6)
    return [
        dataclasses.replace(
            record,
            raw={"val_loss": 1.0, EVIL: 2.0},
            views={EVIL: {"val_loss": 0.9, EVIL: 1.9}, "<b>": {"val_loss": 0.8}},
            forecasts={EVIL: {"val_loss": Expected(0.7, 0.6, 0.8, record.step)}},
            recipes={EVIL: Recipe((1, 2), (0.5, 0.5))},
            skipped={EVIL: EVIL},
            phase=EVIL,
        )
        for record in records
    ]


def test_the_curves_are_those_of_the_records():
    records = falling_run(20)
    found = data_of(page([Reported("runs/a", records)], "val_loss"))
    (run,) = found["runs"]
    assert run["steps"] == [record.step for record in records]
    assert run["tokens"] == [record.tokens for record in records]
    curves = run["metrics"]["val_loss"]
    assert curves["raw"] == [record.raw["val_loss"] for record in records]
    assert curves["views"]["sma2"][:4] == [None, None, None, records[3].views["sma2"]["val_loss"]]
    band = curves["forecasts"]["soon"]
    assert band["steps"] == [record.step + 200 for record in records[2:]]
    assert band["low"] == [record.forecasts["soon"]["val_loss"].low for record in records[2:]]


def test_several_runs_are_overlaid_and_one_without_the_metric_is_left_out():
    other = [at(100, raw={"acc": 0.5}, views={})]
    found = data_of(
        page([Reported("a", falling_run(4)), Reported("b", falling_run(5)), Reported("c", other)], "val_loss")
    )
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    with pytest.raises(ConfigError, match="Measured: acc"):
        page([Reported("c", other)], "val_loss")
    with pytest.raises(ConfigError, match=r"Did you mean 'acc'\?"):
        page([Reported("c", other)], "accc")


def test_a_long_run_is_thinned_and_says_so():
    records = falling_run(20_000)
    records[12_345] = dataclasses.replace(records[12_345], raw={"val_loss": 99.0})
    text = page([Reported("long", records)], "val_loss")
    (run,) = data_of(text)["runs"]
    assert len(run["steps"]) <= 1000
    assert 99.0 in run["metrics"]["val_loss"]["raw"]
    assert "of 20,000 merges are drawn" in text
    assert len(text) < 7e6
    assert all(len(rows) <= 202 for rows in tables_of(text))


def test_what_is_not_a_number_is_a_gap():
    records = [at(1, raw={"val_loss": math.nan}, views={"sma": {"val_loss": math.inf}}), at(2)]
    (run,) = data_of(page([Reported("a", records)], "val_loss"))["runs"]
    assert run["metrics"]["val_loss"]["raw"] == [None, 2.0]


@pytest.mark.parametrize(
    ("raw", "lr", "verdict"),
    [(0.7, 1e-5, "inside, off by +0.0%"), (0.9, 1e-5, "above, off by +28.6%"), (0.7, 3e-4, "rate has not fallen")],
)
def test_a_forecast_is_judged_by_a_run_whose_rate_has_fallen(raw, lr, verdict):
    main = [at(100, forecasts={"soon": {"val_loss": Expected(0.7, 0.6, 0.8, 300)}}), at(300)]
    branch = [at(300, raw={"val_loss": raw}, lr=(lr,))]
    rows = tables_of(page([Reported("main", main), Reported("branch", branch)], "val_loss"))[0]
    assert rows[1][:3] == ["main: soon", "100", "300"]
    assert rows[1][-1] == verdict


def test_forecasts_that_nothing_judges_are_folded_away():
    main = [at(100, forecasts={"soon": {"val_loss": Expected(0.7, 0.6, 0.8, 300)}}), at(300)]
    branch = Reported("branch", [at(300, raw={"val_loss": 0.7}, lr=(1e-5,))])
    alone, both = page([Reported("main", main)], "val_loss"), page([Reported("main", main), branch], "val_loss")
    assert "<details><summary>Forecasts, and what came" in alone
    assert "<details open><summary>Forecasts, and what came" in both


@pytest.mark.parametrize(
    ("tokens", "shown"), [(0, "2.0000"), (409_600, "409,600"), (4_000_000, "4M"), (1_048_576_000_000, "1.049T")]
)
def test_tokens_are_written_as_people_say_them_and_have_no_column_where_none_are_counted(tokens, shown):
    run = Reported("a", [dataclasses.replace(at(100), tokens=tokens)])
    (merges,) = (rows for rows in tables_of(page([run], "val_loss")) if rows[0][0] == "step")
    assert (merges[0][1], merges[1][1]) == ("tokens" if tokens else "raw", shown)


def test_the_best_view_of_an_accuracy_is_the_largest():
    records = [at(1, raw={"val_acc": 0.5}, views={"sma": {"val_acc": 0.6}, "sma2": {"val_acc": 0.4}})]
    text = page([Reported("a", records)], "val_acc")
    assert "best view: sma<" in text
    assert '<td class="bad">0.4000</td>' in text
    assert '<td class="good best">0.6000</td>' in text


def test_configuration_recipes_and_files_are_on_the_page(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "weights").write_bytes(b"x" * 2000)
    (tmp_path / "javascript:alert(1)").write_text("x")
    uses = disk_use(tmp_path, tmp_path / "pages" / "a.html")
    text = page([Reported("a", [at(400)], config="window: 4\n", uses=uses)], "val_loss")
    assert "<pre>window: 4\n</pre>" in text
    assert ["sma", "4", "100 to 400", "4.0", "0.25, 0.25, 0.25, 0.25"] in [
        row for rows in tables_of(text) for row in rows
    ]
    assert "sma8: needs 8" in text
    links = re.findall(r'<a href="([^"]*)">', text)
    assert links == ["./../merged", "./../javascript%3Aalert%281%29"]
    assert (uses[0].num_bytes, uses[0].num_files) == (2000, 1)


def test_names_reach_the_page_as_text_only(tmp_path):
    text = page([Reported(EVIL, evil_run(), EVIL)], "val_loss")
    assert not any(piece in text for piece in ("<img src=x", "<svg onload", "<b>bold", 'document.title="pwned'))
    assert text.count("</script>") == 3
    assert "\x1b" not in text
    assert len(text) < 6e6  # {{plotly}} in a name is not replaced


def test_the_page_asks_nobody_for_anything():
    text = page([Reported("a", falling_run(3))], "val_loss")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?!data:)', text) == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_draws_the_page_runs_no_name_and_complains_of_nothing(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page([Reported(EVIL, evil_run(), EVIL), Reported("b", falling_run(30))], "val_loss"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/b",
    ]
    command = [BROWSER, *options, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert "<title>&lt;/script&gt;" in shown.stdout
    assert len(re.findall(r'<g class="trace scatter', shown.stdout)) > 10  # plotly drew
    assert "pwned</title>" not in shown.stdout


def test_a_missing_chart_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pretrain-merge\[report\]'"):
        page([Reported("a", [at(1)])], "val_loss")
