"""What is predicted from what: by calibrations that never saw the run, the optimizer, the text or the time.

This module fits and predicts; how wrong a prediction is, is the business of `scores`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.annealing.records import METRIC
from benchmarks.forecast import tissue
from benchmarks.forecast.cases import Case
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast import Annealed, Calibration, calibrate
from pretrain_merge.forecast.anneal import reading_of
from pretrain_merge.forecast.fitting import Example, fit
from pretrain_merge.forecast.history import read_history
from pretrain_merge.forecast.law import TERMS
from pretrain_merge.records import MergeRecord, span_of

FORECASTER = "forecaster"
COVERAGE = 0.9
EARLY, _OWN = 2 / 3, 1 / 2  # of a run: what the split by time, and recalibration, are fitted to

# What is left out.
_ABLATED = {
    "law without aJ": ("aJ",),
    "law without aS": ("aS",),
    "law without c1": ("c1",),
    "law without kappa": ("kappa",),
}


@dataclass(frozen=True)
class Answer:
    """A prediction of a case; `half` is half of its interval, None where the method has none."""

    case: Case
    method: str
    split: str
    mean: float
    half: float | None = None


def calibrated(cases: Iterable[Case], source: str) -> Calibration:
    """Fitted to those of the cases that calibrations are fitted to."""
    return fit([case.example for case in cases if case.is_calibrated_on], source=source)


def answers(calibration: Calibration, cases: Iterable[Case], split: str, method: str = FORECASTER) -> list[Answer]:
    """What the forecaster says; cases too far from what it was calibrated on have no answer."""
    found = []
    for case in cases:
        try:
            half = calibration.half_width(case.reading, COVERAGE)
        except ForecastError:
            continue
        found.append(Answer(case, method, split, calibration.expected(case.reading), half))
    return found


def baselines(cases: Sequence[Case], split: str) -> list[Answer]:
    """Raw, the plain mean over the nearest measured span, the published law: nothing is fitted across runs."""
    laws = {}
    found = []
    for case in cases:
        key = case.run.name, case.watching, case.now
        if key not in laws:
            laws[key] = tissue.identify(case.known)
        means = {"raw": case.raw, "merged": case.merged, "published law": laws[key].expected(case.anneal)}
        found += [Answer(case, method, split, mean) for method, mean in means.items()]
    return found


def leave_out(cases: Sequence[Case], split: str, group: Callable[[Case], str]) -> list[Answer]:
    """Each group predicted by a calibration of all others."""
    found = []
    for name in sorted({group(case) for case in cases}):
        calibration = calibrated((case for case in cases if group(case) != name), f"all but {name}")
        found += answers(calibration, (case for case in cases if group(case) == name), split)
    return found


def one_mean(cases: Sequence[Case], split: str) -> list[Answer]:
    """Each run by a calibration of the others, as if only the mean over about the anneal's length had been logged."""
    found = []
    for name in sorted({case.run.name for case in cases}):
        calibration = calibrated((case for case in cases if case.run.name != name), f"all but {name}")
        mine = [case for case in cases if case.run.name == name and case.watching == "dense" and case.kind == "nowcast"]
        for case in mine:
            view = min(case.known[-1].views, key=lambda view: abs(_span(case.known[-1], view) - case.anneal.steps))
            known = [_with_one(record, view) for record in case.known]
            try:
                reading = reading_of(read_history(known, METRIC), case.anneal.steps, case.anneal.shape, case.kind)
            except ForecastError:
                continue
            found += answers(calibration, [replace(case, reading=reading)], split, "one mean alone")
    return found


def _span(record: MergeRecord, view: str) -> float:
    return span_of(record.recipes[view].steps, record.average)


def _with_one(record: MergeRecord, view: str) -> MergeRecord:
    return replace(record, views={name: values for name, values in record.views.items() if name == view})


def _binned(value: float, *limits: float) -> str:
    return f"{sum(value >= limit for limit in limits)}"


# What a new run may be another kind of; runs are about a third each in bins of size and length.
GROUPS: dict[str, Callable[[Case], str]] = {
    "optimizer": lambda case: str(case.run.setup["optimizer"]),
    "text": lambda case: str(case.run.setup["text"]),
    "family": lambda case: "moe" if case.run.setup["family"] == "moe" else "dense",
    "size": lambda case: _binned(case.run.parameters, 124_000, 300_000),
    "length": lambda case: _binned(case.run.setup["num_steps"], 900, 1300),
}


def last_third(cases: Sequence[Case]) -> list[Answer]:
    """Anneals that end in the last third of a run, by those that end before it; also without the run."""
    early = [case for case in cases if case.progress <= EARLY]
    late = [case for case in cases if case.progress > EARLY]
    found = answers(calibrated(early, "the first two thirds"), late, "last third")
    for name in sorted({case.run.name for case in late}):
        calibration = calibrated((case for case in early if case.run.name != name), f"early, without {name}")
        mine = [case for case in late if case.run.name == name]
        found += answers(calibration, mine, "last third, run left out")
    return found


def recalibrated(cases: Sequence[Case]) -> list[Answer]:
    """Later anneals of each run before and after `calibrate` on its own earlier ones, with the others as prior."""
    found = []
    for name in sorted({case.run.name for case in cases}):
        prior = calibrated((case for case in cases if case.run.name != name), f"all but {name}")
        for watching in sorted({case.watching for case in cases if case.run.name == name}):
            mine = [case for case in cases if (case.run.name, case.watching) == (name, watching)]
            own = {case.anneal: case for case in mine if case.progress <= _OWN and case.is_calibrated_on}
            middle = _OWN * mine[0].run.setup["num_steps"]
            later = [case for case in mine if case.now >= middle and case.anneal not in own]
            anneals = [Annealed(anneal.start, anneal.steps, own[anneal].loss, anneal.shape) for anneal in own]
            try:
                after = calibrate(mine[0].run.records[watching], anneals, metric=METRIC, prior=prior)
            except ForecastError:  # all of them are too short to tell
                continue
            found += answers(prior, later, "recalibration", "forecaster before")
            found += answers(after, later, "recalibration", "forecaster after")
    return found


def losers(cases: Sequence[Case], split: str, kept: Sequence[Answer]) -> list[Answer]:
    """The law with parts of it missing, and mixed with the published one, each run predicted without it."""
    found = []
    for name in sorted({case.run.name for case in cases}):
        others = [case for case in cases if case.run.name != name]
        mine = [case for case in cases if case.run.name == name]
        for method, missing in _ABLATED.items():
            law = fit([_without(case, missing) for case in others if case.is_calibrated_on], source=method)
            found += [Answer(case, method, split, law.expected(_without(case, missing).reading)) for case in mine]
        plain = replace(calibrated(others, name), coefficients=(1.0,) * len(TERMS))
        found += [Answer(case, "nothing fitted", split, plain.expected(case.reading)) for case in mine]
    published = {id(answer.case): answer.mean for answer in kept if answer.method == "published law"}
    ours = [answer for answer in kept if answer.method == FORECASTER]
    return found + [
        Answer(answer.case, "mean with published law", split, (answer.mean + published[id(answer.case)]) / 2)
        for answer in ours
    ]


def _without(case: Case, missing: Sequence[str]) -> Example:
    kept = np.array([term not in missing for term in TERMS])
    return replace(case.example, reading=replace(case.reading, terms=case.reading.terms * kept))
