"""Every step of a run's optimizers, whoever takes it. This module knows optimizers and counts nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from pretrain_merge.parameters import named_parameters


class CountsSteps(Protocol):
    """Whoever is told of steps.

    Attributes:
        has_stepped: Set where an optimizer is about to step, or a gradient scaler skips the step.
    """

    has_stepped: bool

    def optimizer_steps(self, place: int, optimizer: Any) -> None:
        """An optimizer has stepped, or one that torch does not know is about to."""


@contextmanager
def optimizer_steps(trainer: Any, module: Any, clock: CountsSteps) -> Iterator[Callable[[Any], None]]:
    """Hear of each step of an optimizer on parameters of a module until the block ends.

    Lightning's hook hears of no step that an overridden `optimizer_step` or a manual loop takes on the optimizer
    itself, and torch's of none that a gradient scaler skips, which Lightning counts. So both are asked. Torch's comes
    after the step: whatever set its rate has done so, and schedulers have not moved it yet (P28).

    Args:
        trainer: Its optimizers come first, in their order.
        module: Optimizers of others than its parameters do not count.
        clock: Told of each step, with the place of the optimizer among those of the run.

    Yields:
        A function to be called with an optimizer by Lightning's `on_before_optimizer_step`.
    """
    places: dict[int, tuple[int | None, Any]] = {}  # by identity; holds the optimizer, so that none other takes its id

    def stepped(optimizer: Any, *_: Any) -> None:
        known = places.get(id(optimizer))
        if known is None:
            known = places[id(optimizer)] = (_place(optimizer, trainer.optimizers, module, places), optimizer)
        if known[0] is not None:
            clock.optimizer_steps(known[0], optimizer)

    def announced(optimizer: Any) -> None:
        if isinstance(optimizer, Optimizer):
            clock.has_stepped = True  # not a call: what a step costs on which nothing is due is its number of calls
        else:  # torch will not tell
            stepped(optimizer)

    handle = register_optimizer_step_post_hook(stepped)
    try:
        yield announced
    finally:
        handle.remove()


def _place(optimizer: Any, trainers: list[Any], module: Any, places: dict[int, tuple[int | None, Any]]) -> int | None:
    for place, item in enumerate(trainers):
        if optimizer is item or optimizer is getattr(item, "optimizer", None):
            return place
    parameters = {id(parameter) for _, parameter in named_parameters(module)}
    if any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        others = [place for place, _ in places.values() if place is not None and place >= len(trainers)]
        return len(trainers) + len(others)  # one that the Trainer does not know
    return None
