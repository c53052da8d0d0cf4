"""A saved workspace of W&B for runs with merging: what would else be put together by hand for each project.

This module knows our metrics' names and `wandb-workspaces`, whose objects it builds; it asks no server. Without the
names of views and forecasts its charts take them by a pattern, so they fit every run of a project.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pretrain_merge.errors import MissingDependencyError
from pretrain_merge.records.record import FORECAST, GAP_CLOSED, RAW, metric_name

Axis = Literal["tokens", "step"]
# those of `plots`
_GREY = "#8a8f98"
# Okabe and Ito's, which colour-blind readers tell apart
_VIEWS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_FORECASTS = ("#7b3294", "#b2182b", "#4d4d4d")


@dataclass(frozen=True)
class Names:
    """What the charts show.

    Attributes:
        metric: Of raw, views and forecasts.
        name: Of the callback.
        views: Merged views in their order; empty: whatever a run has.
        forecasts: Names of forecasts; empty with no views: whatever a run has.
        axis: What the charts are drawn against.
        runs: Ids of the runs; empty: all of the project. Lines of these have colours and marks of their own.
    """

    metric: str = "val_loss"
    name: str = "merge"
    views: tuple[str, ...] = ()
    forecasts: tuple[str, ...] = ()
    axis: Axis = "tokens"
    runs: tuple[str, ...] = ()

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        """Each metric of the overlay with its title, colour, width and mark; the ends of a band are thin and dotted."""
        lines = {metric_name(self.name, RAW, self.metric): _line(RAW, _GREY)}
        for place, view in enumerate(self.views):
            # of more views than colours the first ones again: titles tell them apart
            color = _VIEWS[place % len(_VIEWS)]
            lines[metric_name(self.name, view, self.metric)] = _line(f"merged: {view}", color)
        for place, forecast in enumerate(self.forecasts):
            mean = metric_name(self.name, f"{FORECAST}/{forecast}", self.metric)
            color = _FORECASTS[place % len(_FORECASTS)]
            lines[mean] = _line(f"forecast: {forecast}", color, mark="dashed")
            for end in ("low", "high"):
                lines[f"{mean}/{end}"] = _line(f"forecast: {forecast}, {end}", color, width=0.8, mark="dotted")
        return lines


def workspace(entity: str, project: str, names: Names, *, title: str | None = None) -> Any:
    """The workspace; its `save()` needs a login and a network.

    Args:
        entity: User or team.
        project: Of the runs.
        names: What is shown.
        title: Of the view; default: that of the callback and the metric.

    Raises:
        MissingDependencyError: `wandb-workspaces` is not installed.
    """
    try:
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise MissingDependencyError(
            "Workspaces of W&B are made with wandb-workspaces, which is not installed. Run: pip install "
            "'pretrain-merge[wandb-view]'"
        ) from error
    section = workspaces.Section(name="pretrain-merge", panels=list(_panels(names)), is_open=True)
    section.layout_settings.columns = 2
    filters = [workspaces.Metric("ID").isin(list(names.runs))] if names.runs else []
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=_without_symbols(title or f"{names.name}: {names.metric}"),
        sections=[section],
        runset_settings=workspaces.RunsetSettings(filters=filters),
    )


def _panels(names: Names) -> Iterator[Any]:
    from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser

    def chart(title: str, **what: Any) -> Any:
        return LinePlot(title=title, x=f"{names.name}/{names.axis}", title_x=names.axis, **what)

    literal, metric = re.escape(names.name), re.escape(names.metric)
    overlay: dict[str, Any] = {"metric_regex": rf"^{literal}/({FORECAST}/)?[^/]+/{metric}(/low|/high)?$"}
    if names.views:
        overlay = {"y": list(names.lines), **_styles(names)}
    yield chart(f"{names.metric}: raw, merged and forecast", title_y=names.metric, **overlay)
    if names.views:
        raw = metric_name(names.name, RAW, names.metric)
        gaps = [f"${{{raw}}} - ${{{metric_name(names.name, view, names.metric)}}}" for view in names.views]
        yield chart("raw less merged", y=[raw], custom_expressions=gaps)
    yield chart("share of the gap to the forecast that is closed", metric_regex=rf"^{literal}/[^/]+/{GAP_CLOSED}/.+$")
    yield chart("spread of the snapshots", y=[f"{names.name}/spread"])
    yield chart("snapshots in the window", y=[f"{names.name}/window"])
    yield MediaBrowser(title="curves", media_keys=[f"{names.name}/curves"], num_columns=1)


def _styles(names: Names) -> dict[str, dict[str, Any]]:
    """W&B keeps the look of a line by the id of its run: others are drawn in the colour of their run."""
    styles: dict[str, dict[str, Any]] = {"line_titles": {}, "line_colors": {}, "line_widths": {}, "line_marks": {}}
    for run in names.runs:
        for metric, line in names.lines.items():
            for kind, value in line.items():
                # of several runs, the colour says which, and the legend has its name
                if len(names.runs) == 1 or kind not in ("line_titles", "line_colors"):
                    styles[kind][f"{run}:{metric}"] = value
    return {kind: values for kind, values in styles.items() if values}


def _without_symbols(title: str) -> str:
    """The library refuses titles with any, also with a plus or a dollar."""
    return "".join(
        "-" if unicodedata.category(letter) in ("So", "Sk", "Sm", "Sc", "Cs") else letter for letter in title
    )


def _line(title: str, color: str, *, width: float = 2.0, mark: str = "solid") -> dict[str, Any]:
    return {"line_titles": title, "line_colors": color, "line_widths": width, "line_marks": mark}
