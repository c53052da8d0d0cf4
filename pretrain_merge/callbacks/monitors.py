"""What monitors merged metrics waits for a merge instead of raising or stopping (P29).

A merged metric does not exist before the first merge, and afterwards it changes at merge points only. `EarlyStopping`
or `ModelCheckpoint` on one would raise at the first validation, or lose its patience over a value that nobody measured
again; so would a `ReduceLROnPlateau`. So they look only when a new value is there. This module knows what has a
`monitor`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pretrain_merge.callbacks.borrowing import wrapped
from pretrain_merge.evaluation import isolation
from pretrain_merge.records import RAW, MergeRecord

_CHECKS = ("on_validation_end", "on_train_epoch_end")
_NEVER = "merge"  # an interval of a scheduler that Lightning never asks for


def monitored(items: Iterable[Any], prefix: str) -> list[Any]:
    """Those that monitor a metric of this prefix."""
    return [item for item in items if str(getattr(item, "monitor", "")).startswith(prefix)]


class Monitors:
    """What monitors metrics of one `ModelMerging`, and which value each has seen.

    Args:
        trainer: Its callbacks and schedulers.
        prefix: Metrics that begin with this are ours.
    """

    def __init__(self, trainer: Any, prefix: str) -> None:
        self._watching = monitored(trainer.callbacks, prefix)
        plateaus = monitored(trainer.lr_scheduler_configs, prefix)
        self._plateaus = [config for config in plateaus if config.reduce_on_plateau]
        self._loop = trainer.fit_loop.epoch_loop
        self._num_values: Counter[str] = Counter()  # so far, by metric

    @property
    def checkpoints(self) -> list[Any]:
        """Callbacks among them that save checkpoints."""
        return [callback for callback in self._watching if hasattr(callback, "save_top_k")]

    def new_values(self, record: MergeRecord) -> None:
        """Call after the metrics of a record were published.

        A metric that could be there and is not is nobody's new value either, but whoever waits for it must say so: it
        is counted where its model was measured and nothing failed.
        """
        measured = record.metrics()
        for item in {str(item.monitor) for item in [*self._watching, *self._plateaus]}:
            # a merge whose metric is missing for good must raise in the monitor, not wait for ever
            was_made = item.split("/")[1] in {RAW, *record.views} and not record.num_failed
            self._num_values[item] += item in measured or was_made

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Until the block ends, they look only when a new value is there."""
        with ExitStack() as hooks:
            for callback in self._watching:
                waiting = {hook: self._waiting(callback.monitor, getattr(callback, hook)) for hook in _CHECKS}
                hooks.enter_context(isolation.replaced(callback, **waiting))
            if self._plateaus:
                # P29: Lightning raises where the monitor is missing, and offers no hook around it
                hooks.enter_context(wrapped(self._loop, "_update_learning_rates", self._updating()))
            yield

    def _waiting(self, monitor: str, check: Any) -> Any:
        # per callback: each counts what it has looked at itself
        seen = 0

        def check_new_value(trainer: Any, module: Any) -> None:
            nonlocal seen
            if self._num_values[monitor] > seen:
                check(trainer, module)
                seen = self._num_values[monitor]

        return check_new_value

    def _updating(self) -> Callable[..., None]:
        """A layer around Lightning's update of schedulers, from which those without a new value are hidden."""
        seen = [0] * len(self._plateaus)

        def update_with_new_values(update: Callable[..., None], interval: str, update_plateau_schedulers: bool) -> None:
            with ExitStack() as hidden:
                for place, config in enumerate(self._plateaus):
                    if self._num_values[config.monitor] <= seen[place]:
                        hidden.enter_context(isolation.replaced(config, interval=_NEVER))
                    elif update_plateau_schedulers and self._has_turn(config, interval):
                        seen[place] = self._num_values[config.monitor]
                update(interval=interval, update_plateau_schedulers=update_plateau_schedulers)

        return update_with_new_values

    def _has_turn(self, config: Any, interval: str) -> bool:
        past = self._loop.batch_idx if interval == "step" else self._loop.trainer.current_epoch
        # Lightning's own rule, which it keeps to itself: a value that is not its turn stays new
        return bool(config.interval == interval and (past + 1) % config.frequency == 0)
