"""Records to loggers. This module knows Lightning's logger interface and W&B's axes; it computes nothing."""

from collections.abc import Iterable
from typing import Any

from pretrain_merge.records import Late, MergeRecord


class Tracker:
    """Sends every record to every logger: all metrics of one merge in one call, at the step of the merge (P15).

    One tracker serves the loggers of one run.
    """

    def __init__(self) -> None:
        self._with_axis: set[tuple[int, str]] = set()

    def publish(self, loggers: Iterable[Any], record: MergeRecord) -> None:
        """Log one record.

        Args:
            loggers: Lightning loggers; each is saved afterwards, so that a crash right after a merge loses nothing.
            record: What the merge and its evaluation produced.
        """
        rows = {record.step: record.metrics(), **record.metrics_to_come()}
        for index, logger in enumerate(loggers):
            for step, metrics in rows.items():
                self._define_axes(index, logger, record.name, metrics)
                logger.log_metrics(metrics, step=step)
            logger.save()

    def publish_late(self, loggers: Iterable[Any], late: Late) -> None:
        """Log numbers that came after their merge point, at its step."""
        metrics = late.metrics()
        for index, logger in enumerate(loggers):
            self._define_axes(index, logger, late.name, metrics)
            logger.log_metrics(metrics, step=late.step)
            logger.save()

    def _define_axes(self, index: int, logger: Any, name: str, metrics: Iterable[str]) -> None:
        # a logger of the user's own need not have an `experiment`
        define_metric = getattr(getattr(logger, "experiment", None), "define_metric", None)
        if not callable(define_metric):  # W&B alone draws against a metric
            return
        prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if getattr(logger, "_prefix", "") else ""
        axes = (f"{name}/step", f"{name}/tokens")
        for metric in metrics:
            if (index, metric) not in self._with_axis:
                self._with_axis.add((index, metric))
                # by its full name: an exact definition wins over the logger's own "*" against trainer/global_step
                if metric in axes:
                    define_metric(prefix + metric)
                else:
                    define_metric(prefix + metric, step_metric=prefix + axes[0])
