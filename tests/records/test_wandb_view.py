"""The saved workspace of W&B, by what would be sent: charts of metrics that runs really have."""

import json
import re

import pytest
from harness.records import falling_run

from pretrain_merge.records.wandb_view import Names, workspace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library's own validators


@pytest.fixture(autouse=True)
def library():
    pytest.importorskip("wandb_workspaces", reason="not installed: pip install 'pretrain-merge[wandb-view]'")


def charts(names):
    """Panels by title, as they are sent."""
    spec = json.loads(
        workspace("us", "tests", names)._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    (section,) = spec["section"]["panelBankConfig"]["sections"]
    return {panel["config"]["chartTitle"]: panel["config"] for panel in section["panels"]}, spec


def logged():
    return {key for record in falling_run(5) for key in record.metrics()}


def test_patterns_find_what_a_run_logs_and_nothing_else():
    found, _ = charts(Names())
    overlay = found["val_loss: raw, merged and forecast"]
    assert overlay["xAxis"] == "merge/tokens"
    chosen = {key for key in logged() if re.search(overlay["metricRegex"], key)}
    forecast = {f"merge/forecast/soon/val_loss{end}" for end in ("", "/low", "/high")}
    assert chosen == {"merge/raw/val_loss", "merge/sma/val_loss", "merge/sma2/val_loss"} | forecast
    gaps = found["share of the gap to the forecast that is closed"]["metricRegex"]
    assert {key for key in logged() if re.search(gaps, key)} == {
        f"merge/{view}/gap_closed/soon" for view in ("sma", "sma2")
    }


def test_named_views_are_lines_of_their_own_with_a_band_and_a_gap():
    names = Names(views=("sma", "sma2"), forecasts=("soon",), axis="step", runs=("3xk2a9",))
    found, spec = charts(names)
    overlay = found["val_loss: raw, merged and forecast"]
    assert set(overlay["metrics"]) <= logged()
    assert overlay["xAxis"] == "merge/step"
    assert overlay["overrideMarks"]["3xk2a9:merge/forecast/soon/val_loss/low"] == "dotted"
    assert overlay["overrideColors"]["3xk2a9:merge/sma/val_loss"]["color"] == "#0072b2"
    assert "${merge/raw/val_loss} - ${merge/sma/val_loss}" in found["raw less merged"]["expressions"]
    assert {panel["metrics"][0] for panel in found.values() if panel.get("metrics")} <= logged()
    assert found["curves"]["mediaKeys"] == ["merge/curves"]
    (shown,) = spec["section"]["runSets"][0]["filters"]["filters"]
    assert (shown["op"], shown["value"]) == ("IN", ["3xk2a9"])


def test_of_several_runs_the_colour_says_which():
    found, _ = charts(Names(views=("sma",), runs=("a", "b")))
    overlay = found["val_loss: raw, merged and forecast"]
    assert "overrideColors" not in overlay
    assert "b:merge/sma/val_loss" in overlay["overrideMarks"]


def test_names_are_taken_by_the_letter_in_patterns():
    found, _ = charts(Names(metric="val.loss", name="my+merge"))
    pattern = found["val.loss: raw, merged and forecast"]["metricRegex"]
    assert re.search(pattern, "my+merge/sma/val.loss")
    assert not re.search(pattern, "my+merge/sma/valXloss")
