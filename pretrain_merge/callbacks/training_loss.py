"""The training loss of each step, out of what `training_step` returned. This module knows outputs and no spikes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class TrainingLoss:
    """Sums over the batches of a step, so that accumulated gradients have one loss.

    Lightning has divided those of automatic optimization by their number; others are of one scale among themselves,
    and no scale matters to who compares each with those before.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._newest: Tensor | None = None  # given by `take_with`, and somebody else's, too
        self._is_written = False  # somebody writes into these after us

    def add(self, outputs: Any) -> None:
        """What the hooks after a batch are given: a loss, a mapping with one, or whatever a manual loop returned."""
        loss = _loss_in(outputs)
        if loss is not None:
            loss = loss.detach().to(torch.float32, copy=True)  # a sum in bfloat16 would keep two digits
            self._sum = loss if self._sum is None else self._sum + loss

    def take(self) -> Tensor | None:
        """That of the step which ended, in memory of its own; None where no batch of it told."""
        loss, self._sum = self._sum, None
        return loss

    def take_with(self, outputs: Any, *, is_copy: bool) -> Tensor | float | None:
        """As `add` and `take`; what a single batch gave is taken without a question to torch, where that is safe.

        The first such question after a step takes longer than all else that a step costs on which nothing is due: the
        code that answers it is no longer in a cache.

        Args:
            outputs: As of `add`.
            is_copy: Whether they are of automatic optimization, where Lightning's loss is one number and a copy.
        """
        if self._sum is not None:
            self.add(outputs)
            return self.take()
        if is_copy and type(outputs) is dict and type(loss := outputs.get("loss")) is Tensor:
            # a callback after us that scales `outputs["loss"]` in place writes into this very copy
            if self._newest is not None and self._newest._version:
                self._is_written = True
            if not self._is_written:
                self._newest = loss
                return loss
        loss = _loss_in(outputs)
        # on the host there is nothing to wait for, and to read a number takes a third of what a copy does
        return None if loss is None else float(loss.item()) if loss.is_cpu else loss.detach().clone()


def _loss_in(outputs: Any) -> Tensor | None:
    # to ask for a `Mapping` is a call into Python's own code, and Lightning gives a dictionary
    loss = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    # a loss of tensor parallelism is whole on each rank
    return loss.to_local() if hasattr(loss, "to_local") else loss
