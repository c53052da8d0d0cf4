"""The tables of a report: HTML in which every text is escaped. This module knows records and no browser.

Names, phases and reasons come from files that others may have written, so nothing reaches the page but through `text`.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pretrain_merge.errors import printable
from pretrain_merge.records.disk_use import Use, bytes_text
from pretrain_merge.records.modes import Mode, change, is_better
from pretrain_merge.records.record import Expected, MergeRecord, gaps_closed
from pretrain_merge.records.thinning import evenly

_LONGEST = 120  # of a name; a reason is longer
_LONGEST_REASON = 600
_MOST_ROWS = 200
_MOST_COEFFICIENTS = 12
_ANNEALED = 0.1  # of the rate at which a forecast was made: below it, an anneal counts as ended


@dataclass(frozen=True)
class Reported:
    """One run on the page.

    Attributes:
        name: What it is called there.
        records: Its merge points, oldest first, at least one.
        config: The callback's configuration as text; empty where it is not known.
        uses: What its files take on the disk.
    """

    name: str
    records: Sequence[MergeRecord]
    config: str = ""
    uses: Sequence[Use] = ()


def text(value: object, longest: int = _LONGEST) -> str:
    """Any text as HTML that shows it."""
    shown = printable(value)
    return html.escape(shown if len(shown) <= longest else f"{shown[:longest]}…")


def summary(run: Reported, metric: str, mode: Mode, *, named: bool) -> str:
    """Where the run stands, in a few large numbers; its name above them where the page has several."""
    newest = next(record for record in reversed(run.records) if metric in record.raw)
    raw, views = newest.raw[metric], _measured(newest, metric)
    shown = [("step", f"{newest.step:,}"), ("merges", f"{len(run.records):,}"), (f"raw {metric}", _number(raw))]
    if views:
        best = _best(views, mode)
        shown.append((f"best view: {best}", f"{_number(views[best])} ({_change(views[best], raw)})"))
        shares = gaps_closed(newest).get(best, {})
        shown += [(f"gap to forecast {name}", f"{share:.0%} closed") for name, share in shares.items()]
    for name, expected in newest.forecasts.items():
        if metric in expected:
            shown.append((f"forecast {name}, at step {expected[metric].step:,}", _interval(expected[metric])))
    shown += [("spread", _number(newest.spread)), ("snapshots", str(newest.window))]
    items = "".join(f'<div class="card">{text(label)}<b>{text(value)}</b></div>' for label, value in shown)
    return f'{f"<h2>{text(run.name)}</h2>" if named else ""}<div class="cards">{items}</div>'


def merges(run: Reported, metric: str, mode: Mode, views: Sequence[str]) -> str:
    """Raw and every view at each merge point; of many, some with the first, the best and the last."""
    measured = [record for record in run.records if metric in record.raw]
    # one row is left for the best merge, wherever it lies
    places = evenly(len(measured), _MOST_ROWS - 1) | {_best_place(measured, metric, mode)}
    forecasts = list(dict.fromkeys(name for record in measured for name in record.forecasts))
    more = [f"forecast {name}" for name in forecasts]
    counts_tokens = any(record.tokens for record in measured)
    head = ["step", *(["tokens"] if counts_tokens else []), "raw", *views, "best vs raw", *more, "spread", "window"]
    rows = []
    for place in sorted(places):
        record = measured[place]
        raw, values = record.raw[metric], _measured(record, metric)
        best = _best(values, mode) if values else None
        cells = [_cell(f"{record.step:,}"), *([_cell(_count(record.tokens))] if counts_tokens else [])]
        cells.append(_cell(_number(raw)))
        for view in views:
            good = "good" if view in values and is_better(values[view], raw, mode) else "bad"
            cells.append(_cell(_number(values.get(view)), f"{good} best" if view == best else good))
        cells.append(_cell(_change(values[best], raw) if best else "–"))
        cells += [_cell(_interval(record.forecasts.get(name, {}).get(metric))) for name in forecasts]
        rows.append([*cells, _cell(_number(record.spread)), _cell(str(record.window))])
    few = "" if len(places) == len(measured) else f"{len(places)} of {len(measured):,} merges. "
    return f"<p>{few}{text(metric)}; green is as good as raw or better, the best is bold.</p>" + _table(head, rows)


def came(runs: Sequence[Reported], metric: str) -> tuple[str, bool]:
    """Each forecast beside what was measured where its anneal was to end, in whichever run; whether any is judged."""
    measured: dict[int, list[MergeRecord]] = {}
    for record in (record for run in runs for record in run.records if metric in record.raw):
        measured.setdefault(record.step, []).append(record)
    rows, is_judged = [], False
    for run in runs:
        asked = [
            (record, name) for record in run.records for name in record.forecasts if metric in record.forecasts[name]
        ]
        for place in sorted(evenly(len(asked), _MOST_ROWS)):
            record, name = asked[place]
            expected = record.forecasts[name][metric]
            label = name if len(runs) == 1 else f"{run.name}: {name}"
            shown = [label, f"{record.step:,}", f"{expected.step:,}", _interval(expected)]
            truth, verdict = _truth(record, expected, metric, measured.get(expected.step, ()))
            rows.append([*map(_cell, shown), *truth])
            is_judged |= verdict
    if not rows:
        return "<p>No forecast was made.</p>", False
    head = ["forecast", "made at step", "for step", f"{metric} expected", "raw then", "rate then", "verdict"]
    note = (
        "A forecast is of a run whose learning rate has fallen to nothing. It is judged where a run on this page was "
        f"measured at that step with at most {_ANNEALED:.0%} of the rate: put the annealing branch on the page, too."
    )
    return f"<p>{note}</p>{_table(head, rows)}", is_judged


def recipes(run: Reported) -> str:
    """Which snapshots the newest merge used, and how much of each; which views it lacks, and why."""
    newest = run.records[-1]
    rows = []
    for view, recipe in newest.recipes.items():
        squares = sum(value * value for value in recipe.coefficients)
        shown = [f"{value:.3g}" for value in recipe.coefficients]
        # both ends say what kind it is; ten thousand numbers would be a page
        if len(shown) > _MOST_COEFFICIENTS:
            shown = [*shown[:4], "…", *shown[-4:]]
        steps = f"{recipe.steps[0]:,} to {recipe.steps[-1]:,}" if recipe.steps else "–"
        effective = f"{1 / squares:.1f}" if squares > 0 else "–"
        rows.append([*map(_cell, (view, str(len(recipe.steps)), steps, effective, ", ".join(shown)))])
    missing = "".join(
        f"<p>{text(view)}: {text(reason, _LONGEST_REASON)}</p>" for view, reason in newest.skipped.items()
    )
    if not rows:
        return f"<p>Not in these records.</p>{missing}"
    return (
        _table(["view", "snapshots", "their steps", "effective number", "coefficients, oldest first"], rows) + missing
    )


def files(run: Reported) -> str:
    """What lies in the run's folder, how large it is, and links to it."""
    if not run.uses:
        return ""
    rows = []
    for use in run.uses:
        name = f'<a href="{html.escape(use.link)}">{text(use.name)}</a>'
        rows.append([f"<td>{name}</td>", _cell(bytes_text(use.num_bytes)), _cell(f"{use.num_files:,}")])
    total = f"<p>{bytes_text(sum(use.num_bytes for use in run.uses))} together.</p>"
    return total + _table(["what", "bytes", "files"], rows)


def section(title: str, content: str, *, is_open: bool = True) -> str:
    """A part of the page that can be folded."""
    return (
        f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>{content}</details>" if content else ""
    )


def configuration(run: Reported) -> str:
    """The callback's keys."""
    return f"<pre>{html.escape(printable(run.config, keep=chr(10)))}</pre>" if run.config else ""


def _truth(made: MergeRecord, expected: Expected, metric: str, then: Iterable[MergeRecord]) -> tuple[list[str], bool]:
    """Cells of what was measured where the anneal was to end, where the rate had fallen furthest; whether it judges."""
    rates = [(_share_of_rate(record, made), record.raw[metric]) for record in then]
    if not rates:
        return [_cell("–"), _cell("–"), _cell("not measured")], False
    # the most annealed of the runs that were measured at that step
    rate, value = min(rates, key=lambda item: (math.isnan(item[0]), item[0]))
    cells = [_cell(_number(value)), _cell("–" if math.isnan(rate) else f"{rate:.0%}")]
    # so that NaN, a rate that nobody knows, judges nothing
    if not rate <= _ANNEALED:
        return [*cells, _cell("rate has not fallen")], False
    is_inside = expected.low <= value <= expected.high
    where = "inside" if is_inside else "above" if value > expected.high else "below"
    off = f", off by {value / expected.mean - 1:+.1%}" if expected.mean else ""
    return [*cells, _cell(f"{where}{off}", "good" if is_inside else "bad")], True


def _share_of_rate(record: MergeRecord, made: MergeRecord) -> float:
    return max(record.lr) / max(made.lr) if record.lr and made.lr and max(made.lr) > 0 else math.nan


def _measured(record: MergeRecord, metric: str) -> dict[str, float]:
    return {view: values[metric] for view, values in record.shown.items() if metric in values}


def _best(values: dict[str, float], mode: Mode) -> str:
    sign = 1.0 if mode == "min" else -1.0
    # NaN is never the best, whichever way is up
    return min(values, key=lambda view: math.inf if math.isnan(values[view]) else sign * values[view])


def _best_place(records: Sequence[MergeRecord], metric: str, mode: Mode) -> int:
    best = {place: _measured(record, metric) for place, record in enumerate(records)}
    values = {str(place): found[_best(found, mode)] for place, found in best.items() if found}
    return int(_best(values, mode)) if values else 0


def _interval(expected: Expected | None) -> str:
    return (
        "–" if expected is None else f"{_number(expected.mean)} ({_number(expected.low)} to {_number(expected.high)})"
    )


def _change(value: float, raw: float) -> str:
    return "–" if (share := change(value, raw)) is None else f"{share:+.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _count(number: int) -> str:
    """Four digits and a unit from a million on: `10,485,760,000,000` is neither read nor compared by anyone."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"


def _cell(value: str, style: str = "") -> str:
    # the style is ours: one of three words of the page's own sheet
    return f'<td class="{style}">{text(value)}</td>' if style else f"<td>{text(value)}</td>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = "".join(f"<th>{text(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'
