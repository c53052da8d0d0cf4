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
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
            loss = loss.detach().float()  # a sum in bfloat16 would keep two digits
            # a loss of tensor parallelism is whole on each rank
            loss = loss.to_local() if hasattr(loss, "to_local") else loss
            self._sum = loss if self._sum is None else self._sum + loss

    def take(self) -> Tensor | None:
        """That of the step which ended; None where no batch of it told."""
        loss, self._sum = self._sum, None
        return loss
