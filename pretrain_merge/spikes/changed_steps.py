"""Steps at a part of the rate that the schedule says, with clipped gradients.

This module knows optimizers of torch. It knows nothing of divergences.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class ChangedSteps:
    """Scales the rate of each step of the optimizers of a module, for the time of the step alone.

    Between steps every group has the rate that the user's schedule gave it: a scheduler that computes its rate from the
    last one, one with formulas of its own and a loop that sets it by hand all go on as they would.

    Args:
        module: Optimizers of others than its parameters are left alone.
        factor: By which rates are multiplied in the step that comes.
        clip: Clips the gradients of an optimizer; called where a step brings no closure, which would compute them yet.
    """

    def __init__(self, module: nn.Module, factor: Callable[[], float], clip: Callable[[Any], None]) -> None:
        self._module, self._factor, self._clip = module, factor, clip
        self._is_ours: dict[int, tuple[Any, bool]] = {}  # by identity; holds the optimizer, so that none takes its id
        self._aside: dict[int, tuple[Any, dict[str, Any], Any]] = {}  # by group: who set which rate aside
        self._handles = (
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        )

    def close(self) -> None:
        """Leave optimizers alone, also where a step was broken off."""
        for handle in self._handles:
            handle.remove()
        for place in list(self._aside):
            self._put_back(place)

    def _before(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if not self._trains(optimizer):
            return
        if len(arguments) < 2 and options.get("closure") is None:
            self._clip(optimizer)
        factor = self._factor()
        for group in optimizer.param_groups if factor != 1.0 else ():
            # one inside another (SAM) steps on the same groups
            if id(group) not in self._aside and group.get("lr") is not None:
                rate = group["lr"]
                self._aside[id(group)] = (optimizer, group, rate.clone() if isinstance(rate, Tensor) else rate)
                if isinstance(rate, Tensor):
                    rate.mul_(factor)  # in place: a compiled or captured step reads it where it is
                else:
                    group["lr"] = rate * factor

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for place in [place for place, (owner, _, _) in self._aside.items() if owner is optimizer]:
            self._put_back(place)

    def _put_back(self, place: int) -> None:
        _, group, rate = self._aside.pop(place)
        if isinstance(rate, Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate

    def _trains(self, optimizer: Optimizer) -> bool:
        if id(optimizer) not in self._is_ours:
            ours = {id(parameter) for parameter in self._module.parameters()}
            trains = any(id(item) in ours for group in optimizer.param_groups for item in group["params"])
            self._is_ours[id(optimizer)] = (optimizer, trains)
        return self._is_ours[id(optimizer)][1]
