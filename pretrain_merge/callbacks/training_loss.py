"""The training loss of each step, out of what `training_step` returned. This module knows outputs and no spikes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class TrainingLoss:
    """Sums over the batches of a step, so that accumulated gradients have one loss.

    Lightning has divided those of automatic optimization by their number; others are of one scale among themselves,
    and no scale matters to who compares each with those before.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, outputs: Any) -> None:
        """What the hooks after a batch are given: a loss, a mapping with one, or whatever a manual loop returned."""
        loss = _loss_in(outputs)
        if loss is not None:
            loss = loss.detach().float()  # a sum in bfloat16 would keep two digits
            self._sum = loss if self._sum is None else self._sum + loss

    def take(self) -> Tensor | None:
        """That of the step which ended; None where no batch of it told."""
        loss, self._sum = self._sum, None
        return loss

    def take_with(self, outputs: Any) -> Tensor | None:
        """As `add` and `take`; of a single batch the very tensor, since every operation on it costs the step time."""
        if self._sum is None:
            return _loss_in(outputs)
        self.add(outputs)
        return self.take()


def _loss_in(outputs: Any) -> Tensor | None:
    # to ask for a `Mapping` is a call into Python's own code, and Lightning gives a dictionary
    loss = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    # a loss of tensor parallelism is whole on each rank
    return loss.to_local() if hasattr(loss, "to_local") else loss
