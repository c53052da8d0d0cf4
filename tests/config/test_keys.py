"""What the keys of a configuration mean: views, cadences, forecasts."""

import pytest
from harness.configs import views_of

from pretrain_merge import coefficients
from pretrain_merge.cadence import Cadence, Quantity
from pretrain_merge.config import (
    ForecastConfig,
    MergeConfig,
    View,
    build,
    merge_cadence,
    num_intervals,
    parse_forecasts,
    parse_views,
    save_cadence,
    snapshot_cadence,
)
from pretrain_merge.errors import ConfigError


def test_shorthands_of_views_are_spelt_out():
    assert views_of("sma", "sma4", "wma", "ema", "ema6", "wsm") == (
        View("sma", "sma", span=0.06, follows=True),
        View("sma4", "sma", 4),
        View("wma", "wma", span=0.06, follows=True),
        View("ema", "ema", None, {"alpha": 0.2}, 0.06, follows=True),
        View("ema6", "ema", 6, {"alpha": 0.2}),
        View("wsm", "decay", None, {"shape": "1-sqrt"}, 0.06, follows=True),
    )


def test_a_mapping_names_a_view_its_kind_its_length_and_its_parameters():
    assert views_of({"name": "cos4", "kind": "decay", "last": 4, "shape": "cosine"}, {"name": "wma"}) == (
        View("cos4", "decay", 4, {"shape": "cosine"}),
        View("wma", "wma", span=0.06, follows=True),
    )


def test_a_custom_view_takes_as_many_snapshots_as_it_has_weights():
    (view,) = views_of({"name": "mine", "kind": "custom", "weights": [0.25, 0.25, 0.5]})
    assert view.last == 3


def test_every_kind_of_coefficients_can_be_a_view():
    params = {
        "custom": {"weights": [0.5, 0.5]},
        "ema": {"alpha": 0.3},
        "power": {"gamma": 3.0},
        "extrapolated": {"step": 0.2},
    }
    for kind in coefficients.KINDS:
        (view,) = views_of({"name": "mine", "kind": kind, **params.get(kind, {})})
        assert view.kind == kind


def test_cadences_are_made_of_their_keys():
    config = build(MergeConfig, {"every": 100, "start": "1K", "merge_every": 500, "save": {"every": 2000}})
    assert snapshot_cadence(config) == Cadence(Quantity(100), Quantity(1000))
    assert merge_cadence(config) == Cadence(Quantity(500))
    assert save_cadence(config.save) == Cadence(Quantity(2000))


def test_merges_follow_snapshots_and_nothing_is_saved_unless_asked_for():
    config = build(MergeConfig, {})
    assert merge_cadence(config) is None
    assert save_cadence(config.save) is None


def forecast_of(**options):
    config = build(MergeConfig, {"window": 11, "every": 100, "forecast": {"ours": options}})
    return config, parse_forecasts(config)["ours"].config


def test_a_forecast_without_keys_is_of_a_linear_anneal_over_what_the_window_spans():
    config, forecast = forecast_of()
    assert (forecast.shape, forecast.kind, forecast.metric, forecast.coverage) == (
        "linear",
        "forecast",
        None,
        0.9,
    )
    assert num_intervals(config, forecast) == 10
    assert num_intervals(build(MergeConfig, {"window": 11, "average": "block"}), ForecastConfig()) == 11


def test_the_length_of_a_forecast_is_counted_like_snapshots():
    options = {"every": "2M tokens", "forecast": {"ours": {"steps": "5M tokens"}}}
    config = build(MergeConfig, options)
    assert parse_forecasts(config)["ours"].num_intervals == 2.5


@pytest.mark.parametrize(
    ("forecast", "message"),
    [
        ({"1st": {}}, r"forecast.1st: '1st' is not a name"),
        ({"ours": 200}, r"forecast.ours: 200 is not a mapping. Allowed: a mapping with keys of steps, shape"),
        ({"ours": {"step": 200}}, r"forecast.ours.step: unknown key; did you mean 'steps'\?"),
        (
            {"ours": {"kind": "nowcasts"}},
            r"forecast.ours.kind: 'nowcasts' is out of range. Allowed: forecast or nowcast",
        ),
        ({"ours": {"shape": "1-square"}}, r"forecast.ours.shape: '1-square' .*linear or cosine or 1-sqrt"),
        ({"ours": {"coverage": 0.99}}, r"forecast.ours.coverage: 0.99 .*0.5 to 0.95"),
        ({"ours": {"coverage": "high"}}, r"forecast.ours.coverage"),
        ({"ours": {"steps": "5M tokens"}}, r"forecast.ours.steps: 5000000 tokens, and snapshots are counted in steps"),
        ({"ours": {"steps": -1}}, r"forecast.ours.steps: -1 is not a quantity"),
        ({"ours": {"steps": 1100, "kind": "nowcast"}}, r"spans from 100 steps to 1000 steps. Allowed for a nowcast"),
        ({"ours": {"steps": 50, "kind": "nowcast"}}, r"50 steps, and a window of 11 snapshots"),
    ],
)
def test_a_forecast_that_cannot_be_made_is_refused_with_its_path(forecast, message):
    with pytest.raises(ConfigError, match=message):
        build(MergeConfig, {"window": 11, "every": 100, "forecast": forecast})


@pytest.mark.parametrize("given", [0.2, "20%", "20 %"])
def test_a_share_of_the_run_is_a_number_or_a_percentage(given):
    config = build(MergeConfig, {"span": given, "views": ["sma", "sma4", {"name": "all", "kind": "wma", "span": None}]})
    assert [view.span for view in parse_views(config)] == [0.2, None, None]


@pytest.mark.parametrize("given", [0, -0.1, 1.5, 12, "12", "120%", "0%", "x", True, [], float("nan"), 10**400])
def test_what_is_not_a_share_of_a_run_is_refused_with_the_ways_to_write_one(given):
    with pytest.raises(ConfigError, match=r"^span: .* Allowed: above 0 and up to 1, .* null .* 0\.06 or '6%'\.$"):
        build(MergeConfig, {"span": given})


def test_a_view_has_a_number_of_snapshots_or_a_share_of_the_run():
    with pytest.raises(ConfigError, match=r"^views\[0\]\.span: 0\.2, and the view is of exactly 4 snapshots\."):
        build(MergeConfig, {"views": [{"name": "both", "kind": "sma", "last": 4, "span": 0.2}]})
