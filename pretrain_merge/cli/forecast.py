"""The command `pretrain-merge forecast`: a run's records to a table, a fan chart and an answer about budgets.

This module knows the command's options and which lengths of anneal are worth a row. The law is that of
`pretrain_merge.forecast`.
"""

import json as json_format
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain_merge.cli.results import console_beside, write_result
from pretrain_merge.errors import ForecastError, printable
from pretrain_merge.forecast import Calibration, Forecast, forecast_anneal
from pretrain_merge.records import plots, read_run
from pretrain_merge.records.tables import as_text, expected_cell

if TYPE_CHECKING:
    from rich.table import Table

Answer = Forecast | ForecastError
Ask = Callable[[int], Answer]
_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)  # of the steps so far: the lengths that the calibration covers
_FAN = 24  # lengths in the picture


def forecast(
    run: Path,
    *,
    steps: int | Sequence[int] = (),
    shape: Literal["linear", "cosine", "1-sqrt"] = "linear",
    metric: str = "val_loss",
    coverage: float = 0.9,
    target: float | None = None,
    calibration: Path | None = None,
    every: int | None = None,
    average: Literal["last", "block"] = "last",
    name: str = "merge",
    picture: Path | None = None,
    json: Path | None = None,
) -> None:
    """Forecast what an anneal would reach, from the merges of a run; prints a table and draws the fan chart.

    Args:
        run: A run's folder, its merges.jsonl, a CSV of its metrics, or the .wandb file of an offline run.
        steps: Length of the anneal, or several: '[200, 400]'; default: several, from 2% to 30% of the steps so far.
        shape: How the learning rate falls.
        metric: The loss to forecast.
        coverage: Share of truths that the intervals are to hold.
        target: A loss to reach: also say how many steps of annealing from here that takes.
        calibration: A file that `Calibration.save` wrote; default: the calibration that ships.
        every: Steps between snapshots, for a CSV or a W&B run, which do not say.
        average: What a snapshot was, for these.
        name: Prefix of the metrics.
        picture: Where the picture goes; default: forecast.png beside the records.
        json: Where the numbers go, too; - is standard output.
    """
    console = console_beside(json)
    records = read_run.read_run(run, every=every, average=average, name=name)
    options: dict[str, Any] = {"shape": shape, "metric": metric, "coverage": coverage}
    options["calibration"] = Calibration.load(calibration) if calibration else None
    ahead = _asking(partial(forecast_anneal, records, kind="forecast", **options))
    back = _asking(partial(forecast_anneal, records, kind="nowcast", **options))
    step = records[-1].step
    lengths = [steps] if isinstance(steps, int) else steps or _lengths(step, _SHARES)
    rows = [(length, back(length), ahead(length)) for length in lengths]
    answers = [answer for _, *both in rows for answer in both]
    found = [answer for answer in answers if isinstance(answer, Forecast)]
    if not found:
        raise ForecastError("; ".join(dict.fromkeys(str(answer) for answer in answers)))
    say = partial(console.print, soft_wrap=True, markup=False)
    console.print(
        _table(rows, title=f"{metric} after a {shape} anneal, as of step {step}, with {coverage:.0%} intervals")
    )
    for line in _remarks(answers):
        say(printable(line))
    fan = [item for length in _lengths(step, _fan_shares()) if isinstance(item := ahead(length), Forecast)]
    if target is not None:
        say(_budget(fan, target))
    out = picture or (run if run.is_dir() else run.parent) / "forecast.png"
    plots.save(plots.curves(records, metric=metric, ahead=[item.expected for item in fan]), out)
    say(f"Picture: {printable(out)}")
    if json is not None:
        write_result(json, json_format.dumps([asdict(item) for item in found], indent=1) + "\n")


def _remarks(answers: Sequence[Answer]) -> list[str]:
    """What the answers rest on, which intervals were widened, and why there is a dash (the first reason for all)."""
    found = [answer for answer in answers if isinstance(answer, Forecast)]
    widened = [f"{item.kind} over {item.steps} steps: {item.basis}" for item in found if "widened" in item.basis]
    refused = [f"–: {answer}" for answer in answers if isinstance(answer, ForecastError)]
    return [found[-1].basis, *widened, *refused[:1]]


def _asking(ask: Callable[..., Forecast]) -> Ask:
    def answer(length: int) -> Forecast | ForecastError:
        try:
            return ask(steps=length)
        except ForecastError as error:
            return error

    return answer


def _lengths(step: int, shares: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(max(1, round(share * step)) for share in shares))


def _fan_shares() -> list[float]:
    first, last = _SHARES[0], _SHARES[-1]
    return [first * (last / first) ** (index / (_FAN - 1)) for index in range(_FAN)]


def _table(rows: Sequence[tuple[int, Answer, Answer]], *, title: str) -> "Table":
    from rich.table import Table

    table = Table(title=as_text(title), title_justify="left")
    for column in ("steps of anneal", "ended now", "starts now", "ends at step"):
        table.add_column(column, justify="right")
    for length, *answers in rows:
        back, ahead = (answer.expected if isinstance(answer, Forecast) else None for answer in answers)
        table.add_row(str(length), expected_cell(back), expected_cell(ahead), str(ahead.step) if ahead else "–")
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
