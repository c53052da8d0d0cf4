"""`fast_dev_run`: a full window of the model as it is, once, so that all views, memory and evaluation are tried.

Nothing of it is written to disk.
"""

from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import Cadence, Progress, Quantity
from pretrain_merge.callbacks import merge_point
from pretrain_merge.callbacks.clock import Clock
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.metric_check import MetricCheck
from pretrain_merge.callbacks.monitors import Monitors
from pretrain_merge.callbacks.optimizer_steps import optimizer_steps
from pretrain_merge.callbacks.publisher import Publisher
from pretrain_merge.callbacks.run_folder import run_folder
from pretrain_merge.evaluation import evaluate
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import MergeRecord
from pretrain_merge.runtime.errands import refuse_missing_program

_EVERY_STEP = Cadence(Quantity(1))


class Rehearsal:
    """In place of a `Run`, with its methods.

    Args:
        fit: One call of `Trainer.fit`.

    Attributes:
        clock: Counts steps.
        merger: Holds the window.
        last_record: What was measured; None before the first step.
        best_model_path: None.
    """

    best_model_path: Path | None = None

    def __init__(self, fit: Fit) -> None:
        self._fit, self.module = fit, fit.module
        self._is_over = False
        self.last_record: MergeRecord | None = None
        # a command that is not installed would else show after the first merge, perhaps days from now
        refuse_missing_program(fit.on_publish)
        forecasts = fit.forecasts.of_a_run()
        share = evaluate.data_share(fit.trainer)
        self.clock = Clock(fit.settings.cadences, fit.tokens_per_batch, Progress(), share=share)
        # what was borrowed goes back where a later one of these is refused
        with ExitStack() as borrowed:
            steps = optimizer_steps(fit.trainer, fit.module, self.clock)
            self.optimizer_steps = borrowed.enter_context(steps)
            window = fit.settings.window_in(run_folder(fit.config, fit.trainer), forecasts.views)
            # one step has to fill the window, whatever interval the user set
            window = replace(
                window,
                config=replace(window.config, sample_every=1),
                cadence=_EVERY_STEP,
                merge_cadence=_EVERY_STEP,
            )
            self.merger = borrowed.enter_context(closing(RollingMerger(window)))
            monitors = Monitors(fit.trainer, f"{fit.config.name}/")
            borrowed.enter_context(monitors.waiting())
            self._publisher = Publisher(fit, forecasts, monitors)
            self._borrowed = borrowed.pop_all()

    def catch_up(self) -> None:
        """Nothing is resumed."""

    def step(self, batch: Any, outputs: Any) -> None:
        """After the first step of an optimizer, merge and measure.

        Raises:
            ConfigError: A metric is named, by us or by a monitor, that was not measured.
        """
        fit = self._fit
        if self.clock.batch_ends(batch) is None or self._is_over:
            return
        self._is_over = True
        # the same weights N times take the memory that N snapshots will take
        for step in range(1, fit.config.window + 1):
            self.merger.observe(fit.module, step)
        record = merge_point.measured(
            fit.config,
            fit.trainer,
            fit.module,
            self.merger,
            views=self.merger.views,
            evaluators=fit.evaluators,
            notices=fit.notices,
            keep=lambda *_: None,
        )
        # before publishing: the steps that follow are the user's, and so is the memory
        self.merger.close()
        if record is not None:
            if not record.num_failed:  # else what is missing may have failed
                MetricCheck(fit.settings, (), fit.notices).refuse_missing(fit.trainer, list(record.raw))
            self.last_record = self._publisher.publish(record)

    def meet(self) -> None:
        """Nothing is remembered."""

    def finish(self) -> None:
        """Nothing is saved."""

    def state(self, *, lost: str = "") -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def announce(self) -> None:
        """No checkpoint needs a window."""

    def close(self) -> None:
        """Give back what was borrowed."""
        self._borrowed.close()

    def release(self) -> None:
        """Nothing outlives it."""
