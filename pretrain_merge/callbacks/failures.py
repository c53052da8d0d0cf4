"""Evaluations that fail at a merge point, and whether training goes on without them (`on_error`).

This module knows what failed and why. When it is asked, the raw weights are not back yet: that is the swap's business,
whatever happens here.
"""

import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pretrain_merge import parameters
from pretrain_merge.errors import RankError
from pretrain_merge.evaluation.evaluate import Evaluator, Measure
from pretrain_merge.evaluation.loaders import EvaluationInterrupted
from pretrain_merge.evaluation.users_code import is_of_users_code
from pretrain_merge.records import EVALUATION
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce


class Failures:
    """What failed at one merge point, the same on every rank.

    Args:
        on_error: "raise", or "warn" to go on with what could be measured.
        notices: What the user was told already.

    Attributes:
        reasons: By `evaluation/<model>` where nothing of a model could be measured, else `evaluation/<model>/<name>` of
            the evaluator.
    """

    def __init__(self, on_error: str, notices: WarnOnce) -> None:
        self._goes_on = on_error == "warn"
        self._notices = notices
        self._model = ""  # that is being measured
        self.reasons: dict[str, str] = {}

    def measured(self, measure: Measure, model: str) -> dict[str, float]:
        """The metrics of a model; none where its evaluation failed and training is to go on.

        Raises:
            Exception: What the evaluation raised, where training is not to go on, or not every rank knows of it.
        """
        self._model = model
        try:
            return measure(model)
        except EvaluationInterrupted:
            raise
        except Exception as error:
            if not self._goes_on or not ranks.is_known_to_all_ranks(error):
                raise
            # what could not be put back would train on: no rank goes on then
            if ranks.any_rank(not isinstance(error, RankError) and not is_of_users_code(error)):
                raise
            self._note("", _told(error))
            return {}

    def guarded(self, evaluators: Mapping[str, Evaluator], module: Any) -> dict[str, Evaluator]:
        """Evaluators of which one that fails takes nothing but its own metrics along.

        Where the module is sharded they stay as they are: ranks that wait for a shard of the one that failed cannot be
        asked, and the whole evaluation fails on all of them.
        """
        if not self._goes_on or parameters.is_sharded(module):
            return dict(evaluators)
        return {name: partial(self._evaluate, name, evaluator) for name, evaluator in evaluators.items()}

    def _evaluate(self, name: str, evaluator: Callable[[Any], Mapping[str, Any]], module: Any) -> dict[str, float]:
        values: dict[str, float] = {}
        reason = ""
        try:
            # inside, so that a value that is not a number counts as a failure of this evaluator
            values = {str(key): float(value) for key, value in evaluator(module).items()}
        # a signal is not a failure; and what another rank raised ends all
        except (EvaluationInterrupted, RankError):
            raise
        except Exception as error:
            reason = _told(error)
        # collective, so it is asked where nothing failed too
        if ranks.any_rank(bool(reason)):
            reasons = enumerate(ranks.gather(reason))
            said = [f"rank {number}: {text}" if ranks.num_ranks() > 1 else text for number, text in reasons if text]
            self._note(f"/{name}", "; ".join(said))
            return {}
        return values

    def _note(self, evaluator: str, reason: str) -> None:
        self.reasons[f"{EVALUATION}/{self._model}{evaluator}"] = reason
        what = f"evaluator {evaluator[1:]!r}" if evaluator else "the evaluation"
        self._notices.warn(
            f"failed{evaluator}",
            f"{what} failed on {self._model!r}: {reason}. Training goes on without its metrics (on_error: warn); later "
            f"failures are in the records and counted as 'failed'.",
        )


def _told(error: BaseException) -> str:
    """An error and where it was raised; whoever reads a log has no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f", in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
