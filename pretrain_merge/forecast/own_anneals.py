"""A calibration for runs like one's own, from real anneals of one of them on top of a prior."""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.anneal import reading_of
from pretrain_merge.forecast.calibration import Calibration, shipped
from pretrain_merge.forecast.fitting import Example, updated
from pretrain_merge.forecast.history import read_history
from pretrain_merge.forecast.metrics import find_metric
from pretrain_merge.records import MergeRecord

# Shorter anneals, and those whose mean is still full of noise, moved calibrations to the worse on the suite.
_LEAST_SHARE, _MOST_RATIO = 0.08, 0.15


@dataclass(frozen=True)
class Annealed:
    """A real anneal of a run.

    Attributes:
        start: Step at which it left the run.
        steps: Its length.
        loss: What it ended at, measured as the merges were.
        shape: How its learning rate fell.
    """

    start: int
    steps: int
    loss: float
    shape: str = "linear"


def calibrate(
    records: Sequence[MergeRecord],
    anneals: Sequence[Annealed],
    *,
    metric: str | None = None,
    prior: Calibration | None = None,
) -> Calibration:
    """A calibration for runs like this one, from anneals of its own; the shipped one is the prior.

    Args:
        records: Merge points of the run, oldest first.
        anneals: Real anneals that left it; each must start or end at a merge point.
        metric: The loss; None: the one that is measured.
        prior: The calibration to begin with; None: the one that ships.

    Raises:
        ForecastError: No anneal is given, none says anything, or the records do not allow a forecast of one.
    """
    prior = prior or shipped()
    metric = find_metric(records, metric)
    if not anneals:
        raise ForecastError("no anneals: calibrating takes at least one real anneal of the run.")
    examples = []
    for item in anneals:
        for kind, step in (("nowcast", item.start + item.steps), ("forecast", item.start)):
            known = [record for record in records if record.step <= step]
            if known and known[-1].step == step:
                reading = reading_of(read_history(known, metric), item.steps, item.shape, kind)
                examples.append(Example(reading, item.loss, run=""))
                break
        else:
            raise ForecastError(
                f"the anneal of {item.steps} steps from step {item.start} neither starts nor ends at a merge point. "
                f"Give anneals between steps that the run merged at."
            )
    telling = [item for item in examples if item.reading.share >= _LEAST_SHARE and item.reading.ratio <= _MOST_RATIO]
    if not telling:
        raise ForecastError(
            f"{len(examples)} anneals, each shorter than {_LEAST_SHARE:.0%} of the steps so far or over means that are "
            f"still noisy: such anneals say nothing of longer ones. Give one of about a tenth of the steps."
        )
    examples = telling
    return updated(prior, examples, source=f"{len(examples)} anneals of one run, on top of: {prior.source}")
