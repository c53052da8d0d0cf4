"""What a run and its rehearsal share: one call of `Trainer.fit`, and the settings of the callback in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain_merge.callbacks.clock import TokensPerBatch
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.config import MergeConfig, Settings
from pretrain_merge.evaluation.evaluate import Evaluator
from pretrain_merge.runtime.errands import Work
from pretrain_merge.runtime.log import WarnOnce


@dataclass(frozen=True)
class Fit:
    """One call of `Trainer.fit`.

    Attributes:
        settings: Of the callback.
        tokens_per_batch: Tokens of one batch on one rank: a number, a key of the batch, or a function of the batch.
        evaluators: Further evaluations by name.
        on_publish: What is done with each saved model; None: nothing.
        forecasts: Forecasts without a history.
        notices: What the user was told already.
        trainer: A Trainer before its first batch.
        module: Its module.
    """

    settings: Settings
    tokens_per_batch: TokensPerBatch
    evaluators: Mapping[str, Evaluator]
    on_publish: Work | None
    forecasts: RunForecasts
    notices: WarnOnce
    trainer: Any
    module: Any

    @property
    def config(self) -> MergeConfig:
        """The keys that are values as they stand."""
        return self.settings.config
