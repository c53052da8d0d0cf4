"""Figures show what the records say, and leave pyplot alone."""

import dataclasses
import math
import subprocess
import sys

import pytest

from pretrain_merge.errors import ConfigError, MissingDependencyError
from pretrain_merge.records import Expected, MergeRecord
from pretrain_merge.records.plots import curves

STEPS = list(range(100, 2100, 100))


def record(step, raw, **views):
    return MergeRecord(
        name="merge",
        step=step,
        samples=step,
        tokens=step,
        window=3,
        spread=0.1,
        raw={"val_loss": raw, "accuracy": 1 / raw},
        views={view: {"val_loss": loss, "accuracy": 1 / loss} for view, loss in views.items()},
    )


def run(with_sma_from=300):
    """A falling loss; from some step on the merge is a twentieth lower."""
    raw = {step: 1.0 + 200.0 / step for step in STEPS}
    return [
        record(step, value, **({"sma": 0.95 * value} if step >= with_sma_from else {})) for step, value in raw.items()
    ]


def lines(axes):
    """What is drawn, by label."""
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def drawn(axes, name):
    (values,) = (values for label, values in lines(axes).items() if name in str(label))
    return values


def test_raw_merged_and_annealed_are_drawn_as_recorded():
    branch = {1800: 1.1, 1900: 1.05, 2000: 1.02}
    upper, lower = curves(run(), annealed=branch).axes
    assert drawn(upper, "raw") == {step: 1.0 + 200.0 / step for step in STEPS}
    assert drawn(upper, "sma") == {step: 0.95 * (1.0 + 200.0 / step) for step in STEPS if step >= 300}
    assert drawn(upper, "annealed") == branch
    differences = [values for values in lines(lower).values() if 300 in values]
    assert differences == [{step: pytest.approx(-5.0) for step in STEPS if step >= 300}]


def test_the_legend_names_every_curve_and_quotes_its_last_value():
    upper, _ = curves(run(), annealed={2000: 1.02}).axes
    texts = [text.get_text() for text in upper.get_legend().get_texts()]
    assert texts == ["1.100  raw", "1.045  merged: sma", "1.020  annealed: a real branch"]


def test_axes_are_labelled_and_show_another_metric_on_request():
    figure = curves(run(), metric="accuracy", label="accuracy (share)", title="A run")
    upper, lower = figure.axes
    assert (upper.get_ylabel(), lower.get_xlabel(), upper.get_title(loc="left")) == (
        "accuracy (share)",
        "step",
        "A run",
    )
    assert "raw (%)" in lower.get_ylabel()
    assert drawn(upper, "raw")[100] == pytest.approx(1 / 3)


def test_the_early_fall_does_not_flatten_what_follows():
    upper, _ = curves(run()).axes
    low, high = upper.get_ylim()
    assert high < 1.0 + 200.0 / 100  # the first point is above the picture
    late = [step for step in STEPS if step >= 100 + 0.15 * 1900]
    assert all(low < factor * (1.0 + 200.0 / step) < high for step in late for factor in (0.95, 1.0))


def test_a_view_that_was_skipped_and_a_loss_that_is_no_number_leave_gaps():
    records = run(with_sma_from=1500)
    records[3] = record(400, math.nan)
    upper, lower = curves(records).axes
    assert list(drawn(upper, "sma")) == [1500, 1600, 1700, 1800, 1900, 2000]
    assert math.isnan(drawn(upper, "raw")[400])
    assert all(map(math.isfinite, (*upper.get_ylim(), *lower.get_ylim())))


def test_a_single_merge_and_a_run_without_views_can_be_drawn(tmp_path):
    for records in ([record(100, 2.0, sma=1.9)], [record(100, 2.0)]):
        curves(records).savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_more_views_than_colours_still_get_a_line_each():
    views = {f"sma{number}": 1.0 + number / 10 for number in range(2, 11)}
    upper, _ = curves([record(100, 2.0, **views), record(200, 1.9, **views)]).axes
    assert len(upper.get_lines()) == 1 + len(views)


def test_views_beyond_the_colours_are_told_apart_by_their_dashes():
    views = {f"sma{number}": 1.0 + number / 10 for number in range(2, 11)}
    upper, _ = curves([record(100, 2.0, **views), record(200, 1.9, **views)]).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in upper.get_lines()}
    assert len(looks) == 1 + len(views)


@pytest.mark.parametrize(
    ("every", "tick"), [(100, "2000"), (7_500, "150k"), (100_000, "2M"), (75_000, "1.5M"), (10**8, "2B")]
)
def test_ticks_of_a_long_run_have_a_unit_and_no_power_of_ten_in_a_corner(every, tick):
    _, lower = curves([record(every * number, 2.0) for number in range(1, 21)]).axes
    lower.xaxis.get_major_formatter().set_locs([0, every * 10, every * 20])
    assert lower.xaxis.get_major_formatter()(every * 20) == tick
    assert not lower.xaxis.get_major_formatter().get_offset()


def test_lines_of_very_many_merges_are_thin():
    widths = [curves([record(step, 2.0) for step in range(number)]).axes[0].get_lines()[0] for number in (300, 301)]
    assert widths[0].get_linewidth() > 2 * widths[1].get_linewidth()


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"'val_los' is in none of the 20 records.*accuracy, val_loss. Did you mean 'val_loss'\?"
    ):
        curves(run(), metric="val_los")
    with pytest.raises(ConfigError, match=r"none of the 0 records.*nothing"):
        curves([])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*pretrain-merge\[plots\]"):
        curves(run())


def test_pyplot_is_never_loaded_nor_matplotlib_by_the_import_alone(tmp_path):
    code = (
        "import sys; from pretrain_merge.records.plots import curves; "
        "from pretrain_merge.records import MergeRecord as R; "
        "assert 'matplotlib' not in sys.modules; "
        "curves([R('merge', 1, 1, 1, 1, 0.1, {'val_loss': 1.0}, {})]).savefig(sys.argv[1]); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "figure.png")], check=True)


def band(axes):
    """Lower and upper edge of the only band, by step."""
    (collection,) = axes.collections
    edges: dict[float, list[float]] = {}
    for step, value in collection.get_paths()[0].vertices:
        edges.setdefault(float(step), []).append(float(value))
    return {step: (min(values), max(values)) for step, values in edges.items()}


def test_a_forecast_is_drawn_where_its_anneal_ends_with_its_interval():
    records = [
        dataclasses.replace(item, forecasts={"ahead": {"val_loss": Expected(0.9, 0.8, 1.1, item.step + 200)}})
        for item in run()
    ]
    upper, _ = curves(records).axes
    assert drawn(upper, "forecast: ahead") == {step + 200: 0.9 for step in STEPS}
    assert band(upper) == {step + 200.0: (0.8, 1.1) for step in STEPS}


def test_forecasts_from_the_last_merge_on_fan_out():
    fan = [Expected(0.95 - 0.01 * n, 0.9 - 0.02 * n, 1.0, 2000 + 100 * n) for n in range(1, 5)]
    upper, _ = curves(run(), ahead=fan).axes
    assert drawn(upper, "if annealed from here") == {item.step: item.mean for item in fan}
    assert band(upper)[2400.0] == (pytest.approx(0.82), 1.0)
    assert upper.get_ylim()[0] < 0.82


def test_only_the_views_that_are_asked_for_are_drawn():
    records = [record(step, 2.0, sma=1.5, sma2=1.6) for step in STEPS]
    upper, _ = curves(records, views=["sma2"]).axes
    assert [label for label in lines(upper) if "merged" in str(label)] == ["1.600  merged: sma2"]
    with pytest.raises(ConfigError, match=r"views: \['sma3'\] are in no record. Measured: sma, sma2"):
        curves(records, views=["sma3"])
