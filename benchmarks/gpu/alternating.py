"""The callback switched off and on within one run, so that two clocks of one device are never compared."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.setting import Setting
from pretrain_merge import ModelMerging

# What a callback may do at every step. Those that ours does not override cost nothing either way.
_HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)


class Alternating(ModelMerging):
    """Off, on, on, off, ... in blocks of steps: a steady drift of the clock cancels out.

    Args:
        block: Steps of a block.
        setting: What is waited for at the end of a block.
        **options: Of the callback.
    """

    def __init__(self, block: int, setting: Setting, **options: Any) -> None:
        super().__init__(**options)
        self.block = block
        self.setting = setting
        self.num_batches = 0
        self.ends: list[float] = []

    @property
    def is_on(self) -> bool:
        return _is_on_in(self.num_batches // self.block)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Seconds of neighbouring blocks, off and on; the first block warms up."""
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        numbers = range(1, len(seconds), 2)
        pairs = [(seconds[k - 1], seconds[k], _is_on_in(k)) for k in numbers]
        return [(second, first) if first_is_on else (first, second) for first, second, first_is_on in pairs]


def _is_on_in(block: int) -> bool:
    return block > 0 and (block - 1) % 4 in (1, 2)


def _switched(name: str) -> Callable[..., None]:
    def hook(self: Alternating, *arguments: Any, **options: Any) -> None:
        if self.is_on:
            getattr(super(Alternating, self), name)(*arguments, **options)
        if name == "on_train_batch_end":
            self.num_batches += 1
            if self.num_batches % self.block == 0:
                self.setting.wait()
                self.ends.append(time.perf_counter())

    return hook


for _name in _HOOKS_OF_A_STEP:
    setattr(Alternating, _name, _switched(_name))
