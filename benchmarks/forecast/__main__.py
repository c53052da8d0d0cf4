"""Back-test of the forecasts: `python -m benchmarks.forecast [--json FILE] [--figure FILE] [--fresh] [--calibrate]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.annealing.records import FRESH_FOLDER, Run, read_calibrated, read_suite
from benchmarks.forecast import external, picture, scores, splits
from benchmarks.forecast.cases import Case, read_cases
from benchmarks.measure import show, write_json
from pretrain_merge.forecast.calibration import SHIPPED, shipped

_LEFT_OUT = "leave one run out"
_HEADINGS = {
    "watching": "watching",
    "kind": "kind",
    "method": "method",
    "median": "median",
    "p90": "p90",
    "worst": "worst",
    "bias": "bias",
    "cover": "coverage",
    "width": "width",
    "/merged": "ratio_to_merged",
    "/raw": "ratio_to_raw",
    "n": "n",
}
_PERCENT = ("median", "p90", "worst", "bias", "coverage", "width")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Predict, print tables in percent, write rows in fractions; returns the rows."""
    options = _parser().parse_args(arguments)
    runs = _chosen(read_suite(FRESH_FOLDER) if options.fresh else read_calibrated(), options.only)
    cases = read_cases(runs)
    if options.calibrate:
        splits.calibrated(cases, source_of(runs)).save(SHIPPED)
        num_readings = sum(case.is_calibrated_on for case in cases)
        print(f"wrote {SHIPPED.name}, from {num_readings} readings of {len(runs)} runs")
        return []
    if options.fresh:
        found = splits.answers(shipped(), cases, "fresh runs") + splits.baselines(cases, "fresh runs")
        rows = scores.rows_of(found) + _by_run(found)
    else:
        left_out = splits.leave_out(cases, _LEFT_OUT, lambda case: case.run.name)
        rows = scores.rows_of(_backtest(cases, left_out)) + scores.worse_than_merged(left_out) + scores.floor(runs)
        rows += external.rows(shipped())
        if options.figure:
            picture.predictions(left_out + splits.baselines(cases, _LEFT_OUT)).savefig(options.figure)
            print(f"picture: {options.figure}")
    _show(rows)
    write_json(options.json, rows)
    return rows


def source_of(suite: Sequence[Run]) -> str:
    """What a calibration on these runs says of itself."""
    sizes = [run.parameters for run in suite]
    smallest, largest = f"{min(sizes) / 1e3:.0f} thousand", f"{max(sizes) / 1e6:.1f} million"
    return f"{len(suite)} runs of benchmarks/annealing, {smallest} to {largest} parameters"


def _backtest(cases: Sequence[Case], left_out: list[splits.Answer]) -> list[splits.Answer]:
    kept = left_out + splits.baselines(cases, _LEFT_OUT)
    late = [case for case in cases if case.progress > splits.EARLY]
    return [
        *kept,
        *splits.losers(cases, _LEFT_OUT, kept),
        *splits.one_mean(cases, _LEFT_OUT),
        *splits.last_third(cases),
        *splits.baselines(late, "last third"),
        *(
            answer
            for name, group in splits.GROUPS.items()
            for answer in splits.leave_out(cases, f"leave one {name} out", group)
        ),
        *splits.recalibrated(cases),
    ]


def _by_run(answers: Sequence[splits.Answer]) -> list[dict[str, Any]]:
    """The forecaster's rows for each run: a few runs may hide behind their median."""
    rows = []
    for name in sorted({answer.case.run.name for answer in answers}):
        mine = [answer for answer in answers if answer.case.run.name == name and answer.method == splits.FORECASTER]
        rows += [row | {"split": name} for row in scores.rows_of(mine)]
    return rows


def _chosen(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    if unknown := sorted(set(names) - {run.name for run in runs}):
        sys.exit(f"{', '.join(unknown)}: no such run. Known: {', '.join(run.name for run in runs)}.")
    return [run for run in runs if not names or run.name in names]


def _show(rows: Sequence[dict[str, Any]]) -> None:
    for split in dict.fromkeys(row["split"] for row in rows):
        shown = [{key: _cell(key, row[key]) for key in _HEADINGS.values()} for row in rows if row["split"] == split]
        show(f"{split}: in percent of the true loss", sorted(shown, key=_place), _HEADINGS)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["watching"], row["kind"] != "nowcast", row["kind"]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in _PERCENT:
        return f"{100 * value:.1f}" if key == "coverage" else f"{100 * value:.3f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as one JSON list, in fractions")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw every anneal, predicted without its run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fresh", action="store_true", help="the shipped calibration on runs that nothing was fitted to")
    what.add_argument(
        "--external", type=Path, metavar="FILE", help="the shipped calibration on figures of others' logs"
    )
    what.add_argument("--calibrate", action="store_true", help="refit the calibration that ships, and write it")
    parser.add_argument("--only", nargs="*", default=[], metavar="RUN", help="these runs alone")
    return parser


if __name__ == "__main__":
    main()
