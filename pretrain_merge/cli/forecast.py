"""The command `pretrain-merge forecast`: a run's records to a table, a fan chart and an answer about budgets.

This module knows the command's options and which lengths of anneal are worth a row. The law is that of
`pretrain_merge.forecast`.
"""

import json as json_format
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain_merge.cadence import Share, parse_interval
from pretrain_merge.cli.results import console_beside, write_picture, write_result
from pretrain_merge.cli.run_names import folder_of, run_names
from pretrain_merge.errors import ConfigError, ForecastError, printable
from pretrain_merge.forecast import Calibration, Forecast, decide, find_metric, forecast_anneal, read_history
from pretrain_merge.records import MergeRecord, plots, read_run, span_of
from pretrain_merge.records.tables import as_text, expected_cell

if TYPE_CHECKING:
    from rich.table import Table

Answer = Forecast | ForecastError
Ask = Callable[[int], Answer]
Row = tuple[int, Answer, Answer]  # length, ended now, starts now
_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # of the steps so far: the lengths that the calibration covers
_USUAL_SHARE = 0.1  # of the steps so far
_FACTOR = re.compile(r"widened ([0-9.]+) times")
_FEW = 3  # merge points, below which no run is forecast
_FAN = 24  # lengths in the picture


def forecast(
    run: Path,
    *,
    steps: int | str | Sequence[int | str] = (),
    shape: Literal["linear", "cosine", "1-sqrt", "1-square"] = "linear",
    metric: str | None = None,
    coverage: float = 0.9,
    target: float | str | None = None,
    calibration: Path | None = None,
    every: int | str | None = None,
    average: Literal["last", "block"] | None = None,
    name: str = "merge",
    picture: Path | None = None,
    json: Path | None = None,
) -> None:
    """Forecast what an anneal would reach, from the merges of a run, and whether to anneal now or to go on.

    Prints a table with the answer in a sentence below, and draws the fan chart.

    Args:
        run: A run's folder, its merges.jsonl, a CSV of its metrics, or the .wandb file of an offline run.
        steps: Length of the anneal, once or several times: 200, 10% (of the steps so far), '8B tokens'; default: some
            from 2% to 30% of the steps so far.
        shape: How the learning rate falls.
        metric: The loss to forecast; default: the only one with "loss" in its name, or the usual one among several.
        coverage: Share of truths that the intervals are to hold.
        target: A loss to reach, above 0: also say how many steps of annealing from here that takes.
        calibration: A file that `Calibration.save` wrote; default: the calibration that ships.
        every: Distance between snapshots as in the run's configuration, for a CSV that does not say: 1000, 1%.
        average: What a snapshot was, for a CSV, which never says; default: last.
        name: Prefix of the metrics.
        picture: Where the picture goes; default: forecast.png beside the records.
        json: Where the numbers go, too; - is standard output.
    """
    wanted = None if target is None else _loss(target)
    console = console_beside(json)
    records = read_run.read_run(run, every=every, average=average, name=name)
    # once, so that the table, the sentence and the picture are of the same metric
    metric = find_metric(records, metric)
    options: dict[str, Any] = {"shape": shape, "metric": metric, "coverage": coverage}
    options["calibration"] = Calibration.load(calibration) if calibration else None
    ahead = _asking(partial(forecast_anneal, records, kind="forecast", **options))
    back = _asking(partial(forecast_anneal, records, kind="nowcast", **options))
    step = records[-1].step
    asked = [steps] if isinstance(steps, int | str) else steps
    lengths = list(dict.fromkeys(_length(item, records[-1]) for item in asked)) or _usual_lengths(records[-1])
    rows = [(length, back(length), ahead(length)) for length in lengths]
    answers = [answer for _, *both in rows for answer in both]
    found = [answer for answer in answers if isinstance(answer, Forecast)]
    # a table of dashes answers nothing; the reasons do
    if not found:
        reasons = list(dict.fromkeys(str(answer) for answer in answers))
        # waiting helps no run that has ended
        shorter = ["A run that has ended needs a shorter `every`, or `merge_every`, to have more."]
        raise ForecastError(" ".join(reasons + (shorter if len(records) < _FEW else [])))
    say = partial(console.print, soft_wrap=True, markup=False)
    title = f"{metric} after a {shape} anneal, as of step {step}, with {coverage:.0%} intervals"
    console.print(_table(rows, reference=_reference(records[-1], metric), title=title))
    for line in [*_decisions(records, rows, options), *_remarks(answers), *_unseen(records[-1])]:
        say(printable(line))
    # lengths that the calibration does not cover leave the fan, as they left the table
    fan = [item for length in _lengths(step, _fan_shares()) if isinstance(item := ahead(length), Forecast)]
    if wanted is not None:
        say(_reached(records[-1], metric, wanted) or _budget(fan, wanted))
    expected = [item.expected for item in fan]

    def draw(path: Path) -> None:
        plots.save(plots.curves(records, metric=metric, ahead=expected, title=run_names([run])[run]), path)

    write_picture(console, draw, picture, folder_of(run) / "forecast.png", what="Picture")
    if json is not None:
        write_result(json, json_format.dumps([asdict(item) for item in found], indent=1) + "\n")


def _loss(asked: float | str) -> float:
    """A loss as a user wrote it; also what the command line cannot read as a number, so that the answer is ours.

    Raises:
        ConfigError: It is not a number above 0.
    """
    try:
        loss = float(asked)
    except ValueError:
        loss = math.nan
    if not (math.isfinite(loss) and loss > 0.0):
        raise ConfigError(f"target: {asked} is not a loss to reach. Allowed: a number above 0. Leave it out for none.")
    return loss


def _length(asked: int | str, newest: MergeRecord) -> int:
    """Steps of an anneal that is as long as a user wrote.

    Raises:
        ConfigError: It is not a length, or counts what the run did not.
    """
    length = parse_interval(asked, key="steps")
    if isinstance(length, Share):
        return max(1, round(length.percent / 100.0 * newest.step))
    if length.unit == "steps":
        return length.amount
    counted = newest.tokens if length.unit == "tokens" else newest.samples
    if not counted:
        raise ConfigError(f"steps: {length} cannot be told in steps, as the records count none. Name steps.")
    return max(1, round(length.amount * newest.step / counted))


def _remarks(answers: Sequence[Answer]) -> list[str]:
    """What the answers rest on, which intervals were widened and why, and why there is a dash (the first reason)."""
    found = [answer for answer in answers if isinstance(answer, Forecast)]
    widened: dict[str, list[str]] = {}
    for item in found:
        for reason in item.widened:
            # one line for each reason, which widens every length by another factor
            factor = _FACTOR.search(reason)
            where = f"{item.kind} {item.steps}{f': {factor[1]} times' if factor else ''}"
            widened.setdefault(_FACTOR.sub("widened", reason), []).append(where)
    said = [f"{reason} ({', '.join(where)})" for reason, where in widened.items()]
    refused = [f"–: {answer}" for answer in answers if isinstance(answer, ForecastError)]
    return [found[-1].basis.partition("; interval widened")[0], *said, *refused[:1]]


def _unseen(newest: MergeRecord) -> list[str]:
    """What the records cannot say."""
    told = "the file holds no learning rates: this is of a run whose rate did not change over the merges that were read"
    return [] if newest.lr else [told]


def _asking(ask: Callable[..., Forecast]) -> Ask:
    def answer(length: int) -> Forecast | ForecastError:
        try:
            return ask(steps=length)
        except ForecastError as error:
            return error

    return answer


def _usual_lengths(newest: MergeRecord) -> list[int]:
    """Shares of the steps so far that the means reach over, and the longest mean itself: it answers both questions."""
    spans = [span_of(recipe.steps, newest.average) for recipe in newest.recipes.values() if len(recipe.steps) > 1]
    # beyond the calibration a row would be a dash
    longest = [round(max(spans))] if spans and max(spans) <= _SHARES[-1] * newest.step else []
    usual = [length for length in _lengths(newest.step, _SHARES) if not spans or length >= min(spans)]
    return sorted({*usual, *longest}) or _lengths(newest.step, _SHARES[-1:])


def _lengths(step: int, shares: Sequence[float]) -> list[int]:
    # early in a run several shares round to one length
    return list(dict.fromkeys(max(1, round(share * step)) for share in shares))


def _fan_shares() -> list[float]:
    first, last = _SHARES[0], _SHARES[-1]
    # evenly in the logarithm: the curve is steepest where anneals are short
    return [first * (last / first) ** (index / (_FAN - 1)) for index in range(_FAN)]


def _decisions(records: Sequence[MergeRecord], rows: Sequence[Row], options: Mapping[str, Any]) -> list[str]:
    """Anneal now, or go on first: for the length of about a tenth of the steps so far, among those that have a row."""
    known = [length for length, _, ahead in rows if isinstance(ahead, Forecast)]
    if not known:
        return []
    length = min(known, key=lambda length: abs(length / records[-1].step - _USUAL_SHARE))
    history = read_history(records, options["metric"])
    try:
        return [decide(history, steps=length, **options).sentence()]
    except ForecastError as error:
        return [f"whether to anneal now or later: {error}"]


def _reference(record: MergeRecord, metric: str) -> dict[str, float]:
    """What there is without an anneal: raw, and the best mean."""
    merged = {f"merged ({view})": values[metric] for view, values in record.shown.items() if metric in values}
    best = min(merged, key=lambda view: merged[view], default=None)
    return {"raw": record.raw[metric]} | ({best: merged[best]} if best else {})


def _reached(record: MergeRecord, metric: str, target: float) -> str:
    """Where no anneal is needed; empty: one is."""
    reached = [f"{name} is at {value:.4f}" for name, value in _reference(record, metric).items() if value <= target]
    return f"{target:g} is reached already, without an anneal: {' and '.join(reached)}." if reached else ""


def _table(rows: Sequence[Row], *, reference: Mapping[str, float], title: str) -> "Table":
    from rich.table import Table

    table = Table(title=as_text(title), title_justify="left")
    for column in ("steps of anneal", "ended now", "starts now", "ends at step"):
        table.add_column(column, justify="right")
    for length, *answers in rows:
        back, ahead = (answer.expected if isinstance(answer, Forecast) else None for answer in answers)
        table.add_row(str(length), expected_cell(back), expected_cell(ahead), str(ahead.step) if ahead else "–")
    table.add_section()
    for name, value in reference.items():
        table.add_row(as_text(name), f"{value:.4f}", "", "")
    return table


def _budget(fan: Sequence[Forecast], target: float) -> str:
    """How long an anneal from here must be to reach a loss, by the same law; the picture's lengths are tried."""
    likely = next((item for item in fan if item.mean <= target), None)
    sure = next((item for item in fan if item.high <= target), None)
    if likely is None:
        best = min(fan, key=lambda item: item.mean)
        return (
            f"{target:g} is not reached by an anneal from here: the longest that the calibration covers, "
            f"{fan[-1].steps} steps, is expected to end at {best.mean:.4f}. Train on at constant rate and ask again."
        )
    text = f"{target:g} is expected after {likely.steps} steps of annealing from here, at step {likely.expected.step}"
    surely = f"{sure.steps} steps reach it" if sure else "no length that the calibration covers reaches it"
    return f"{text}; {surely} with the interval's upper end."
