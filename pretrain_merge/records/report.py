"""Runs to one page that a browser shows without a network: curves that can be zoomed, tables, configuration, files.

The page holds everything that it needs, plotly's script among it, and a policy by which the browser runs the two
scripts that were written here and nothing else, whatever a record has as a name. This module knows the page as a whole;
its tables are those of `report_sections`.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain_merge._version import __version__
from pretrain_merge.errors import ConfigError, MissingDependencyError, printable
from pretrain_merge.records import report_sections as sections
from pretrain_merge.records.metric_names import did_you_mean
from pretrain_merge.records.modes import Mode, mode_of
from pretrain_merge.records.plots import view_names
from pretrain_merge.records.record import MergeRecord
from pretrain_merge.records.report_sections import Reported
from pretrain_merge.records.thinning import with_extremes

_PAGE, _SCRIPT = (Path(__file__).with_name(f"report.{kind}") for kind in ("html", "js"))
_MOST_POINTS = 1000  # of a curve: beyond, a browser takes seconds to draw
_LONGEST_NAME = 40
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def page(runs: Sequence[Reported], metric: str, *, mode: Mode | None = None) -> str:
    """The page.

    Args:
        runs: At least one; several are overlaid.
        metric: What is drawn at first, and what the tables are of. At least one of the runs measured it.
        mode: Whether its smallest value is the best or its largest; None: as its name tells.

    Raises:
        ConfigError: No run measured the metric.
        MissingDependencyError: plotly is not installed.
    """
    measured = [run for run in runs if any(metric in record.raw for record in run.records)]
    if not measured:
        known = sorted({name for run in runs for record in run.records for name in record.raw})
        raise ConfigError(
            f"metric: {metric!r} is in none of the runs. Measured: {', '.join(known) or 'nothing'}."
            f"{did_you_mean(metric, known)}"
        )
    mode = mode or mode_of(metric)
    several = len(measured) > 1
    parts = []
    for run in measured:
        views = list(view_names(run.records))
        of = f" of {run.name}" if several else ""
        parts += [
            sections.section(f"Merges{of}", sections.merges(run, metric, mode, views), is_open=not several),
            sections.section(f"The newest merge{of}", sections.recipes(run), is_open=False),
            sections.section(f"Configuration{of}", sections.configuration(run), is_open=False),
            sections.section(f"Files{of}", sections.files(run), is_open=False),
        ]
    forecasts, is_judged = sections.came(measured, metric)
    # a run without its anneal has as many rows as merges, each of which says that nothing is known
    parts.insert(0, sections.section("Forecasts, and what came", forecasts, is_open=is_judged))
    plotly, script = _plotly(), _SCRIPT.read_text(encoding="utf-8")
    drawn = [_drawn(run, metric) for run in measured]
    metrics = list(dict.fromkeys([metric, *(name for run in measured for name in run.records[-1].raw)]))
    curves = [_data(run, records, metrics) for run, records in zip(measured, drawn, strict=True)]
    summaries = "".join(sections.summary(run, metric, mode, named=several) for run in measured)
    return _filled(
        policy=_policy(plotly, script),
        title=sections.text(" · ".join(run.name for run in measured)),
        subtitle=sections.text(f"pretrain-merge {__version__}: raw and merged, measured on the same batches"),
        before="" if several else summaries,
        after=summaries if several else "",
        thinned=sections.text(_counted(measured, drawn)),
        sections="".join(parts),
        data=_json({"metric": metric, "metrics": metrics, "runs": curves}),
        plotly=plotly,
        script=script,
    )


def _counted(runs: Sequence[Reported], drawn: Sequence[Sequence[MergeRecord]]) -> str:
    """How many merges the curves have points of, where that is not all."""
    pairs = list(zip(runs, drawn, strict=True))
    if all(len(records) == len(run.records) for run, records in pairs):
        return ""
    return f"{', '.join(f'{len(records):,} of {len(run.records):,}' for run, records in pairs)} merges are drawn."


def _drawn(run: Reported, metric: str) -> list[MergeRecord]:
    return with_extremes(run.records, _MOST_POINTS, lambda record: record.raw.get(metric, math.nan))


def _data(run: Reported, records: Sequence[MergeRecord], metrics: Sequence[str]) -> dict[str, Any]:
    """What the script draws, for each metric that the run measured: lists of equal length, with gaps."""
    return {
        "name": _short(run.name),
        "steps": [record.step for record in records],
        "tokens": [record.tokens for record in records] if all(record.tokens for record in records) else None,
        "spread": [record.spread for record in records],
        "window": [record.window for record in records],
        "metrics": {
            metric: _curves(records, metric) for metric in metrics if any(metric in record.raw for record in records)
        },
    }


def _curves(records: Sequence[MergeRecord], metric: str) -> dict[str, Any]:
    forecasts = dict.fromkeys(name for record in records for name in record.forecasts)
    return {
        "raw": [record.raw.get(metric) for record in records],
        "views": {
            _short(view): [record.views.get(view, {}).get(metric) for record in records] for view in view_names(records)
        },
        "forecasts": {_short(name): _band(records, name, metric) for name in forecasts},
    }


def _band(records: Sequence[MergeRecord], name: str, metric: str) -> dict[str, list[float]]:
    """A forecast by where its anneals end; tokens there as if they went on as they came."""
    found = [(record, record.forecasts[name][metric]) for record in records if metric in record.forecasts.get(name, {})]
    # by the step that is forecast: a band is drawn from left to right
    found.sort(key=lambda item: item[1].step)
    return {
        "steps": [value.step for _, value in found],
        # at the rate so far: the step lies ahead, where tokens are not counted yet
        "tokens": [record.tokens / max(1, record.step) * value.step for record, value in found],
        "mean": [value.mean for _, value in found],
        "low": [value.low for _, value in found],
        "high": [value.high for _, value in found],
    }


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def _json(values: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: `<` is spelled out, so that nothing in it ends the element."""
    # inside of a script element `</script>` in a name would end it
    return json.dumps(_plain(values), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain(values: Any) -> Any:
    """What is not a finite number becomes null, a gap in a curve."""
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_plain(value) for value in values]
    # a gap in the curve; JSON has no word for NaN
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _policy(*scripts: str) -> str:
    """The browser runs scripts with these contents only, and asks nobody for anything."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # nothing is fetched and only these two scripts run, whatever a name in the records says
    rules = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
    return html.escape(f"{rules}; base-uri 'none'; form-action 'none'")


def _filled(**parts: str) -> str:
    """The page with its places filled, all at once: what fills one place is not looked through for another."""
    template = _PAGE.read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: parts[place[1]], template)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependencyError(
            "The page is drawn with plotly, which is not installed. Run: pip install 'pretrain-merge[report]'"
        ) from error
    script: str = get_plotlyjs()
    return script
