"""`EarlyStopping` and `ModelCheckpoint` on merged metrics: they wait for a merge instead of raising or stopping (P29).

A merged metric does not exist before the first merge, and afterwards it changes at merge points only. A callback that
monitors one would raise at the first validation, or lose its patience over a value that nobody measured again. So
their checks run only when a new value is there. This module knows callbacks that have a `monitor`.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pretrain_merge.evaluation import isolation

_CHECKS = ("on_validation_end", "on_train_epoch_end")


class Monitors:
    """The callbacks that monitor metrics of one `ModelMerging`, and which value each has seen.

    Args:
        callbacks: All callbacks of the Trainer.
        prefix: Metrics that begin with this are ours.
    """

    def __init__(self, callbacks: Iterable[Any], prefix: str) -> None:
        self._watching = [item for item in callbacks if str(getattr(item, "monitor", "")).startswith(prefix)]
        self._num_published = 0

    @property
    def checkpoints(self) -> list[Any]:
        """Callbacks among them that save checkpoints."""
        return [callback for callback in self._watching if hasattr(callback, "save_top_k")]

    def new_values(self) -> None:
        """Call after merged metrics were published."""
        self._num_published += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Until the block ends, their checks run only when a new value is there."""
        with ExitStack() as hooks:
            for callback in self._watching:
                waiting = {hook: self._waiting(getattr(callback, hook)) for hook in _CHECKS}
                hooks.enter_context(isolation.replaced(callback, **waiting))
            yield

    def _waiting(self, check: Any) -> Any:
        seen = 0

        def check_new_value(trainer: Any, module: Any) -> None:
            nonlocal seen
            if self._num_published > seen:
                check(trainer, module)
                seen = self._num_published

        return check_new_value
