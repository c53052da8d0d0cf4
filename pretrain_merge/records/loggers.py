"""Records to loggers. This module knows Lightning's logger interface, W&B's axes and TensorBoard's layout.

It computes nothing. Rank 0 alone has real experiments: on other ranks Lightning's stand-in has every attribute, each a
function that does nothing.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pretrain_merge.records import FORECAST, GAP_CLOSED, RAW, Late, MergeRecord, metric_name, metric_names
from pretrain_merge.records.modes import Mode, mode_of
from pretrain_merge.records.showcase import Showcase


class Tracker:
    """Sends every record to every logger: all metrics of one merge in one call, at the step of the merge (P15).

    One tracker serves the loggers of one run. W&B is also given the configuration, a picture and a table, TensorBoard a
    layout of its custom scalars.

    Args:
        config: The callback's keys as plain values; None: they are logged nowhere.
        forecasts: Which metric each forecast is of, by its name; None: of the loss.
        modes: Whether a metric is best at its smallest or its largest value, where its name does not tell.
        showcase: Draws the picture and the table; None: there are none.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        forecasts: Mapping[str, str | None] | None = None,
        modes: Mapping[str, Mode] | None = None,
        showcase: Showcase | None = None,
    ) -> None:
        self._config, self._forecasts, self._modes = config, dict(forecasts or {}), dict(modes or {})
        self._showcase = showcase
        self._with_axis: set[tuple[int, str]] = set()
        self._with_layout: set[int] = set()

    def begin(self, loggers: Iterable[Any], name: str) -> None:
        """Log the configuration in W&B's `run.config`, under a key that is nobody else's."""
        for logger in loggers:
            if self._config is not None and _is_wandb(logger):
                # a resumed run may have been given another one
                logger.experiment.config.update({f"{name}/config": dict(self._config)}, allow_val_change=True)

    def publish(self, loggers: Iterable[Any], record: MergeRecord) -> None:
        """Log one record.

        Args:
            loggers: Lightning loggers; each is saved afterwards, so that a crash right after a merge loses nothing.
            record: What the merge and its evaluation produced.
        """
        loggers, rows = list(loggers), {record.step: record.metrics(), **record.metrics_to_come()}
        for index, logger in enumerate(loggers):
            self._lay_out(index, logger, record)
            for step, metrics in rows.items():
                self._define_axes(index, logger, record.name, metrics, self._best(record))
                # P15: an explicit step for all, since the loggers' own is one behind in validation
                logger.log_metrics(metrics, step=step)
            logger.save()  # a run that is killed keeps what it measured
        if self._showcase is not None:
            self._showcase.add(record, [logger for logger in loggers if _is_wandb(logger)])

    def publish_late(self, loggers: Iterable[Any], late: Late) -> None:
        """Log numbers that came after their merge point, at its step."""
        metrics = late.metrics()
        for index, logger in enumerate(loggers):
            self._define_axes(index, logger, late.name, metrics)
            logger.log_metrics(metrics, step=late.step)
            logger.save()

    def finish(self, loggers: Iterable[Any]) -> None:
        """Log picture and table of the whole run."""
        if self._showcase is not None:
            self._showcase.show([logger for logger in loggers if _is_wandb(logger)])

    def _define_axes(
        self, index: int, logger: Any, name: str, metrics: Iterable[str], best: Mapping[str, Mode] | None = None
    ) -> None:
        # a logger of the user's own need not have an `experiment`
        define_metric = getattr(getattr(logger, "experiment", None), "define_metric", None)
        if not callable(define_metric):  # W&B alone draws against a metric
            return
        prefix, best = _prefix(logger), best or {}
        axes = (f"{name}/step", f"{name}/tokens")
        for metric in metrics:
            if (index, metric) not in self._with_axis:
                self._with_axis.add((index, metric))
                # by its full name: an exact definition wins over the logger's own "*" against trainer/global_step
                axis = {} if metric in axes else {"step_metric": prefix + axes[0]}
                summary = {"summary": f"{best[metric]},last"} if metric in best else {}
                define_metric(prefix + metric, **axis, **summary)

    def _best(self, record: MergeRecord) -> dict[str, Mode]:
        """Which value of a metric says most of a run: of raw and of the views that the user asked for."""
        return {
            metric_name(record.name, model, metric): self._modes.get(metric) or mode_of(metric)
            for model, values in {RAW: record.raw, **record.shown}.items()
            for metric in values
        }

    def _lay_out(self, index: int, logger: Any, record: MergeRecord) -> None:
        """TensorBoard reads the first layout of a run only: written once, by patterns, before most curves exist."""
        add_custom_scalars = getattr(getattr(logger, "experiment", None), "add_custom_scalars", None)
        if callable(add_custom_scalars) and index not in self._with_layout:
            # TensorBoard keeps the last layout that it was given, and this one would be the same
            self._with_layout.add(index)
            add_custom_scalars({record.name: self._charts(_prefix(logger) + record.name, record.raw)})

    def _charts(self, name: str, metrics: Iterable[str]) -> dict[str, list[Any]]:
        # names are the user's, and the charts match by patterns
        literal = re.escape(name)
        charts: dict[str, list[Any]] = {
            metric: ["Multiline", [rf"^{literal}/({FORECAST}/)?[^/]+/{re.escape(metric)}$"]] for metric in metrics
        }
        for forecast, wanted in self._forecasts.items():
            metric = metric_names.the_loss(metrics) if wanted is None else metric_names.found(wanted, metrics)
            if metric is None:
                continue
            mean = metric_name(name, f"{FORECAST}/{forecast}", metric)
            charts[f"forecast: {forecast}"] = ["Margin", [mean, f"{mean}/low", f"{mean}/high"]]
        if self._forecasts:
            charts["gap closed"] = ["Multiline", [rf"^{literal}/[^/]+/{GAP_CLOSED}/.+$"]]
        charts |= {counter: ["Multiline", [rf"^{literal}/{counter}$"]] for counter in ("spread", "window")}
        return charts


def _is_wandb(logger: Any) -> bool:
    """Whether it logs to W&B, here: the stand-in of other ranks has a `config` that is a function."""
    experiment = getattr(logger, "experiment", None)
    has_axes = callable(getattr(experiment, "define_metric", None))
    # by what it can do, not by its class: there are wrappers, and the client may not be installed
    return has_axes and hasattr(getattr(experiment, "config", None), "update")


def _prefix(logger: Any) -> str:
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if getattr(logger, "_prefix", "") else ""
