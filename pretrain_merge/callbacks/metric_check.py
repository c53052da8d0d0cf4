"""Names of metrics that a run was given, held against what its first validation measures.

A misspelt name would show at the first merge only, hours into a run. This module knows where names of metrics are
written (our keys, and what other callbacks and schedulers monitor); it measures nothing.
"""

from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any, NamedTuple

from pretrain_merge.callbacks.monitors import monitored
from pretrain_merge.config import Settings
from pretrain_merge.errors import ConfigError, nearest
from pretrain_merge.records import FORECAST, RAW, metric_name, metric_names
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce

_ENDS = ("/low", "/high")  # of a forecast's interval
_LIGHTNINGS = ("lightning.", "pytorch_lightning.", "torch.", "pretrain_merge.")  # no code of the user's


class _Wanted(NamedTuple):
    """A metric that somebody names.

    Attributes:
        key: Who, for messages.
        metric: As it is written there.
    """

    key: str
    metric: str


class MetricCheck:
    """Looks once in each call of `fit`.

    Args:
        settings: Of the callback.
        evaluators: Names of evaluations; which metrics they give is not known before they run.
        notices: What the user was told already.
    """

    def __init__(self, settings: Settings, evaluators: Iterable[str], notices: WarnOnce) -> None:
        self._settings = settings
        self._evaluators = frozenset(evaluators)
        self._notices = notices
        self._is_due = False  # until a validation of this fit was looked at

    def begin(self, trainer: Any) -> None:
        """Refuse monitors of views and forecasts that there are not, which needs no validation.

        Raises:
            ConfigError: There is one; names the nearest metric that there will be.
        """
        self._is_due = True
        for wanted in self._monitors(trainer):
            self._refuse_other_model(wanted)

    def look(self, trainer: Any, module: Any) -> None:
        """Hold all names against what a validation of the run's own measured. Collective, the first time.

        Raises:
            ConfigError: One was not measured; names the nearest that was.
        """
        if not self._is_due or trainer.state.fn != "fit":
            return
        # a metric may be logged on one rank only
        measured = list(dict.fromkeys(name for names in ranks.gather(list(trainer.callback_metrics)) for name in names))
        is_rehearsed = trainer.sanity_checking
        self._is_due = is_rehearsed and not measured
        if not measured:
            return
        try:
            self.refuse_missing(trainer, measured)
        except ConfigError as error:
            asks = {"is_evaluating_merge"} | ({"sanity_checking"} if is_rehearsed else set())
            if not _asked_by_user(asks, [module, *trainer.callbacks]):
                raise
            # P7: the module measures less now than it may at a merge
            self._is_due = is_rehearsed
            self._notices.warn("names", f"as far as a first validation shows, {error}")

    def refuse_missing(self, trainer: Any, measured: list[str]) -> None:
        """Refuse names that are not among those measured, except what evaluators will give.

        Raises:
            ConfigError: There is one.
        """
        for key, metric in self._keys():
            if not self._is_of_an_evaluator(metric):
                metric_names.measured_name(key, metric, measured)
        for wanted in self._monitors(trainer):
            model, metric = self._parts(wanted.metric)
            is_ours = metric in measured or self._is_of_an_evaluator(metric) or _is_derived(metric)
            if model is not None and not is_ours:
                known = [metric_name(self._settings.config.name, model, name) for name in measured]
                meant = metric_names.found(wanted.metric, known) or nearest(wanted.metric, known)
                raise ConfigError(
                    f"{wanted.key}: {wanted.metric!r} will not be measured. {model!r} will have: {', '.join(measured)}."
                    f"{f' Did you mean {meant!r}?' if meant else ''}"
                )

    def _keys(self) -> Iterator[_Wanted]:
        """Those of the configuration."""
        if self._settings.config.save.best is not None:
            yield _Wanted("save.best", self._settings.config.save.best)
        for name, forecast in self._settings.forecasts.items():
            if forecast.config.metric is not None:
                yield _Wanted(f"forecast.{name}.metric", forecast.config.metric)

    def _monitors(self, trainer: Any) -> Iterator[_Wanted]:
        """Those of other callbacks, and of schedulers that wait for a plateau."""
        for item in monitored([*trainer.callbacks, *trainer.lr_scheduler_configs], f"{self._settings.config.name}/"):
            kind = type(getattr(item, "scheduler", item)).__name__
            yield _Wanted(f"{kind}, monitor", str(item.monitor))

    def _is_of_an_evaluator(self, metric: str) -> bool:
        return metric.partition("/")[0] in self._evaluators

    def _parts(self, name: str) -> tuple[str | None, str]:
        """Raw, view or forecast, and the metric; None and nothing for a counter, such as `merge/spread`."""
        _, _, rest = name.partition("/")
        model, _, metric = rest.partition("/")
        if model == FORECAST:
            forecast, _, metric = metric.partition("/")
            model = f"{FORECAST}/{forecast}"
            for end in _ENDS:
                metric = metric.removesuffix(end)
        return (model, metric) if metric else (None, "")

    def _refuse_other_model(self, wanted: _Wanted) -> None:
        model, metric = self._parts(wanted.metric)
        views = [view.name for view in self._settings.views]
        models = [RAW, *views, *(f"{FORECAST}/{name}" for name in self._settings.forecasts)]
        if model is not None and model not in models:
            known = [metric_name(self._settings.config.name, item, metric) for item in models]
            raise ConfigError(
                f"{wanted.key}: {wanted.metric!r} is of {model!r}, which is not configured. There will be: "
                f"{', '.join(models)}.{metric_names.did_you_mean(wanted.metric, known)}"
            )


def _is_derived(metric: str) -> bool:
    """Whether it is said of a view or forecast besides its metrics: what it spans, closes of a gap, or ends at."""
    return metric in ("span", "step") or metric.startswith("gap_closed/")


def _asked_by_user(names: set[str], objects: Iterable[Any]) -> bool:
    """Whether code of the user's asks one of these, and so may log other metrics by what it is told."""
    classes = {
        kind for item in objects for kind in type(item).__mro__ if not f"{kind.__module__}.".startswith(_LIGHTNINGS)
    }
    codes = [getattr(value, "__code__", None) for kind in classes for value in vars(kind).values()]
    return any(names & _names_in(code) for code in codes if isinstance(code, CodeType))


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(item) for item in code.co_consts if isinstance(item, CodeType)]
    return set(code.co_names).union(*inner)
