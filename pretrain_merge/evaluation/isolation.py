"""What an evaluation borrows of a run, and how it is given back: stand-ins for the Trainer's parts, a module as it was.

This module knows what an evaluation loop and a user's validation hooks may touch. It runs no evaluation itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any

from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import loaders, muting
from pretrain_merge.parameters import named_parameters
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import WarnOnce


@contextmanager
def checkpoints_wait(trainer: Any, notices: WarnOnce) -> Iterator[None]:
    """Checkpoints asked for inside are written when the block has ended, also by an exception, with the same arguments.

    Inside, the model may hold merged weights and the Trainer's parts may be stand-ins; neither belongs in a checkpoint.
    """
    save = trainer.save_checkpoint
    waiting: list[tuple[Any, Any]] = []

    def wait(*args: Any, **kwargs: Any) -> None:
        notices.warn(
            "checkpoint",
            f"step {trainer.global_step}: a checkpoint was asked for while a merge is evaluated. It is written when "
            f"the raw weights are back, and holds them; so is every further one.",
        )
        if (args, kwargs) not in waiting:  # raw and every view ask for the same
            waiting.append((args, kwargs))

    try:
        with replaced(trainer, save_checkpoint=wait):
            yield
    except BaseException as error:
        # a save waits for all ranks, and one of several may have failed alone; a signal ends all of them together
        if ranks.num_ranks() > 1 and not isinstance(error, loaders.EvaluationInterrupted):
            waiting.clear()
        raise
    finally:
        for args, kwargs in waiting:
            save(*args, **kwargs)


@contextmanager
def stubbed_trainer(trainer: Any) -> Iterator[None]:
    """Nothing that the evaluation does reaches the user's callbacks, loggers, profiler, clock or decision to stop."""
    with (
        muting.muted(trainer.callbacks, trainer.loggers),
        # the user's profiler would charge his validation for our passes; the clock is that of P25
        replaced(trainer, profiler=PassThroughProfiler(), should_stop=trainer.should_stop, _last_val_time=0.0),
        stage(trainer, "validating"),
    ):
        yield


@contextmanager
def stage(trainer: Any, name: str) -> Iterator[None]:
    """The Trainer's running stage is another one."""
    before = trainer.state.stage
    setattr(trainer, name, True)
    try:
        yield
    finally:
        trainer.state.stage = before


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes have other values; those that the object did not have itself are gone afterwards.

    Args:
        owner: Any object, class or module. What its class keeps for it, in a slot or behind a property, is set back.
        **attributes: Their values meanwhile.
    """
    own = getattr(owner, "__dict__", {})
    # `hasattr` of the object would run a property that may raise or build something
    kept_by_class = [name for name in attributes if hasattr(type(getattr_static(type(owner), name, None)), "__set__")]
    before = {name: own[name] for name in attributes if name in own}
    before |= {name: getattr(owner, name) for name in kept_by_class if hasattr(owner, name)}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            elif name in getattr(owner, "__dict__", kept_by_class):
                delattr(owner, name)


@contextmanager
def gradients_hidden(module: nn.Module) -> Iterator[None]:
    """Inside there are no gradients: those that accumulate are out of reach of an evaluator that calls `backward`.

    Raises:
        EvaluationError: A parameter is such that its gradient does not fit it any more; all others have theirs.
    """
    gradients = [(name, parameter, parameter.grad) for name, parameter in named_parameters(module)]
    try:
        # hidden, not zeroed: a `backward` would add to what accumulates, and zeroing loses it
        for _, parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        if misfits := [name for name, parameter, gradient in gradients if not _give_back(parameter, gradient)]:
            raise EvaluationError(
                f"parameter {misfits[0]!r} and {len(misfits) - 1} more have another shape, dtype or device than before "
                f"a merge was evaluated, and cannot be put back. Allowed in an evaluation: to read weights, and to "
                f"change what can be undone. Work on a copy of the module (copy.deepcopy) there."
            )


def _give_back(parameter: Tensor, gradient: Tensor | None) -> bool:
    try:
        parameter.grad = gradient
    except RuntimeError:
        return False
    return True


@contextmanager
def buffers_of_rank_0(model: Any) -> Iterator[None]:
    """Buffers are those of rank 0 where DDP will make them so before the next training step, and it still does then.

    DDP would broadcast them in the first forward of an evaluation, which a rank without a batch would miss, and no more
    until another training step has ended: views would be measured with other buffers than raw. Collective.
    """
    is_ddp = isinstance(model, DistributedDataParallel)
    if not is_ddp or not model.will_sync_module_buffers():
        yield
        return
    # as DDP itself would in its next forward, so that training sees what it would have seen
    model._sync_buffers()
    with replaced(model, require_forward_param_sync=False):
        yield
