"""Which metric of a run a forecast can be of: a loss. Knows names and values, and no law."""

import math
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pretrain_merge.errors import ForecastError
from pretrain_merge.forecast.points import Mean
from pretrain_merge.records import MergeRecord, metric_names

if TYPE_CHECKING:
    from pretrain_merge.forecast.history import History

_RISE = 0.002  # of a loss over the whole stretch: more is not noise of a merged model
_NO_LOSS = re.compile(
    r"(^|[^a-z])(acc|accuracy|f1|auc|auroc|bleu|rouge|ppl|perplexity|score|em)([^a-z]|$)", re.IGNORECASE
)
_LOSS = Mean._fields.index("loss")


def find_metric(records: Sequence[MergeRecord], wanted: str | None = None) -> str:
    """The loss that a forecast is of, as the records call it.

    Args:
        records: Merge points of one run, oldest first.
        wanted: Its name, as people write it; None: the loss by its name, as the callback chooses it.

    Raises:
        ForecastError: None is wanted, and there is none, or several.
    """
    measured = list(records[-1].raw) if records else []
    if wanted is not None:
        return metric_names.found(wanted, measured) or wanted
    name = metric_names.the_loss(measured)
    if name is None and measured:
        why, candidates = which_loss(measured)
        raise ForecastError(
            f"{why} Name one: metric={candidates[0]!r} (--metric {shlex.quote(candidates[0])} on the command line)."
            if candidates
            else why
        )
    return name or "a loss"  # without records the refusal is about them


def which_loss(measured: Sequence[str]) -> tuple[str, list[str]]:
    """Why it is not clear which metric is the loss, and those that may be it.

    Args:
        measured: Names of metrics, of which none is `the_loss`.
    """
    candidates = [name for name in measured if not _NO_LOSS.search(name)]
    candidates = [name for name in candidates if "loss" in name.lower()] or candidates
    if not candidates:
        return (
            f"measured is {', '.join(measured)}, and a forecast is of a loss: smaller is better, and above 0. Log one "
            f"in validation_step, as in self.log('val_loss', loss); the next merge measures it.",
            [],
        )
    return f"which metric is the loss is not clear: measured is {', '.join(candidates)}.", candidates


def refuse_what_is_not_a_loss(history: "History", metric: str) -> None:
    """Raise unless a metric looks like a loss.

    Args:
        history: Merge points with its values.
        metric: Its name.

    Raises:
        ForecastError: It is not a loss by its name, was not above 0 and finite, or rose.
    """
    if _NO_LOSS.search(metric):
        raise ForecastError(
            f"metric {metric!r} is not a loss by its name. The law holds for a loss such as cross entropy: smaller is "
            f"better, and above 0. Measure and name one (of a perplexity, its logarithm)."
        )
    _refuse_bad_values(history, metric)
    merged = np.flatnonzero(history.num_means)
    if len(merged) < 3:
        return
    first, last = (min(mean.loss for mean in history.means_at(index)) for index in merged[[0, -1]])
    if not last <= first * (1.0 + _RISE):
        raise ForecastError(
            f"metric {metric!r} of the merged model rose from {first:.6g} to {last:.6g} between steps "
            f"{history.steps[0]:.0f} and {history.steps[-1]:.0f}: not a loss, or a run that diverges. Name a metric "
            f"that falls."
        )


def _refuse_bad_values(history: "History", metric: str) -> None:
    bad = ~(np.isfinite(history.raw) & (history.raw > 0.0))
    losses = history.means[_LOSS]
    is_read = np.arange(len(losses))[:, None] < history.num_means
    bad |= (is_read & ~(np.isfinite(losses) & (losses > 0.0))).any(axis=0)
    for index in np.flatnonzero(bad)[:1].tolist():
        values = (history.raw[index].item(), *(mean.loss for mean in history.means_at(index)))
        value = next(value for value in values if not (math.isfinite(value) and value > 0.0))
        raise ForecastError(
            f"metric {metric!r} was {value!r} at step {history.steps[index]:.0f}, and a loss is above 0 and finite. "
            f"Name another metric, or a run that has not diverged."
        )
