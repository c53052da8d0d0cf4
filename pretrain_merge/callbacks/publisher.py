"""A record on its way out: to the forecasts, the loggers, `merges.jsonl` and Lightning's own metrics."""

from dataclasses import asdict
from pathlib import Path

import torch

from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.forecasts import RunForecasts
from pretrain_merge.callbacks.monitors import Monitors
from pretrain_merge.records import Late, MergeRecord, append_late, append_record
from pretrain_merge.records.loggers import Tracker
from pretrain_merge.records.showcase import Showcase
from pretrain_merge.records.thinning import History


class Publisher:
    """Shows the records of one run.

    Args:
        fit: Whose Trainer has the loggers.
        forecasts: Of the run; they go on from each record.
        monitors: Are told that there are new values.
        file: `merges.jsonl`; None: records are written nowhere.
        history: The records before, of a run that goes on; None: there are none.
    """

    def __init__(
        self,
        fit: Fit,
        forecasts: RunForecasts,
        monitors: Monitors,
        file: Path | None = None,
        history: History | None = None,
    ) -> None:
        self._trainer = fit.trainer
        self._forecasts = forecasts
        self._monitors = monitors
        self._file = file
        config = fit.config
        self._tracker = Tracker(
            asdict(config),
            forecasts={name: forecast.config.metric for name, forecast in fit.settings.forecasts.items()},
            # the schema has refused other words than these two
            modes={config.save.best: "max" if config.save.mode == "max" else "min"} if config.save.best else {},
            showcase=Showcase(config.name, history or History(), fit.notices.warn),
        )
        self._tracker.begin(fit.trainer.loggers, config.name)

    def publish(self, record: MergeRecord) -> MergeRecord:
        """Show a record; returns it with its forecasts.

        Raises:
            CheckpointError: The file cannot be written.
        """
        record = self._forecasts.with_forecasts(record)
        self._tracker.publish(self._trainer.loggers, record)
        if self._trainer.is_global_zero and self._file is not None:
            append_record(self._file, record)
        metrics = {key: torch.tensor(value, dtype=torch.float64) for key, value in record.metrics().items()}
        self._trainer.callback_metrics.update(metrics)
        self._monitors.new_values(record)
        return record

    def finish(self) -> None:
        """Training has ended: loggers that show the whole run are given all of it."""
        self._tracker.finish(self._trainer.loggers)

    def publish_late(self, late: Late) -> None:
        """Show numbers that came after their merge point; on rank 0.

        Raises:
            CheckpointError: The file cannot be written.
        """
        self._tracker.publish_late(self._trainer.loggers, late)
        if self._file is not None:
            append_late(self._file, late)
