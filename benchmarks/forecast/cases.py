"""Every anneal of a run beside what was known of the run when its loss was asked for. Knows no way to predict."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track

from benchmarks.annealing.records import METRIC, Run
from benchmarks.annealing.setups import Anneal
from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.anneal import reading_of
from pretrain_merge.forecast.fitting import Example
from pretrain_merge.forecast.history import read_history
from pretrain_merge.forecast.law import Reading
from pretrain_merge.records import MergeRecord, span_of

CALIBRATED_UP_TO = 0.3  # of the steps so far: the farthest that a forecast is fitted to


@dataclass(frozen=True)
class Case:
    """One question with its true answer.

    Attributes:
        run: Whose anneal it is.
        watching: How the run was watched: "dense", "sparse" or "block".
        kind: "nowcast" or "forecast".
        anneal: The branch.
        now: Step of the newest merge that was known.
        known: Merge points up to now.
        reading: What the law reads from them.
        loss: What the branch ended at.
    """

    run: Run
    watching: str
    kind: str
    anneal: Anneal
    now: int
    known: Sequence[MergeRecord]
    reading: Reading
    loss: float

    @property
    def progress(self) -> float:
        """Where the anneal ends, as a share of the run."""
        return (self.anneal.start + self.anneal.steps) / self.run.setup["num_steps"]

    @property
    def reach(self) -> str:
        """The kind, and how far a forecast reaches as a share of the steps so far."""
        if self.kind == "nowcast":
            return "nowcast"
        share = self.reading.share
        return "forecast 10%" if share < 0.15 else "forecast 15-30%" if share <= CALIBRATED_UP_TO else "forecast >30%"

    @property
    def is_calibrated_on(self) -> bool:
        """Whether a calibration is fitted to cases like it."""
        return self.kind == "nowcast" or self.reading.share <= CALIBRATED_UP_TO

    @property
    def raw(self) -> float:
        """Loss of the live model now."""
        return self.known[-1].raw[METRIC]

    @property
    def merged(self) -> float:
        """Loss now of the plain mean over the measured span that is nearest to the anneal's length."""
        newest = self.known[-1]
        nearest = min(
            newest.views, key=lambda view: abs(span_of(newest.recipes[view].steps, newest.average) - self.anneal.steps)
        )
        return newest.views[nearest][METRIC]

    @property
    def example(self) -> Example:
        return Example(self.reading, self.loss, self.run.name)


def read_cases(runs: Sequence[Run]) -> list[Case]:
    """All anneals of all runs, asked for in all ways; what `forecast_anneal` refuses is left out."""
    console = Console(stderr=True)
    return [case for run in track(runs, "reading the runs", console=console, transient=True) for case in _cases(run)]


def _cases(run: Run) -> list[Case]:
    cases = []
    for watching, records in run.records.items():
        for branch in run.anneals:
            anneal = Anneal(branch["start"], branch["steps"], branch["shape"], branch["order"])
            for kind, now in (("nowcast", anneal.start + anneal.steps), ("forecast", anneal.start)):
                known = [record for record in records if record.step <= now]
                # a nowcast is of the anneal that sees the run's own batches
                if not known or known[-1].step != now or (kind == "nowcast" and anneal.order):
                    continue
                try:
                    reading = reading_of(read_history(known, METRIC), anneal.steps, anneal.shape, kind)
                except ForecastError:
                    continue
                cases.append(Case(run, watching, kind, anneal, now, known, reading, branch["loss"]))
    return cases
