"""What an evaluation borrows of a run, and how it is given back: stand-ins for the Trainer's parts, a module as it was.

This module knows what an evaluation loop and a user's validation hooks may touch. It runs no evaluation itself.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from pretrain_merge import parameters
from pretrain_merge.evaluation import loaders
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import Notices

_CONTAINERS = (list, dict, set, OrderedDict)


@contextmanager
def checkpoints_wait(trainer: Any, notices: Notices) -> Iterator[None]:
    """Checkpoints asked for inside are written when the block has ended, also by an exception, with the same arguments.

    Inside, the model may hold merged weights and the Trainer's parts may be stand-ins; neither belongs in a checkpoint.
    """
    save = trainer.save_checkpoint
    waiting: list[tuple[Any, Any]] = []

    def wait(*args: Any, **kwargs: Any) -> None:
        notices.once(
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
def stand_ins(trainer: Any) -> Iterator[None]:
    """Nothing that the evaluation does reaches the user's callbacks, loggers, profiler, clock or decision to stop."""
    deaf = [_deaf(callback) for callback in trainer.callbacks]
    silent = [_SilentLogger(trainer.log_dir) for _ in trainer.loggers]
    with (
        replaced(trainer, callbacks=deaf, _loggers=silent, profiler=PassThroughProfiler()),
        replaced(trainer, should_stop=trainer.should_stop, _last_val_time=0.0),
        stage(trainer, "validating"),
    ):
        yield


def _deaf(callback: Any) -> Any:
    """The same callback, with the same state, that hears of no validation; a bar still finds itself in the Trainer."""
    twin: Any = object.__new__(_deaf_class(callback.__class__))
    twin.__dict__ = callback.__dict__
    return twin


@cache
def _deaf_class(kind: Any) -> type:
    # properties, because those win over a hook that somebody put on the instance
    hooks = {name: property(lambda _: _hears_nothing) for name in dir(kind) if name.startswith("on_validation")}
    return type(kind.__name__, (kind,), hooks)


def _hears_nothing(*_: Any, **__: Any) -> None:
    pass


class _SilentLogger(DummyLogger):
    """Takes everything and keeps nothing; has the folder of the user's, for hooks of theirs that write files."""

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        self._folder = folder

    @property
    def save_dir(self) -> str | None:
        return self._folder

    @property
    def log_dir(self) -> str | None:
        return self._folder


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
    """Attributes have other values; those that the object did not have itself are gone afterwards."""
    before = {name: value for name, value in vars(owner).items() if name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextmanager
def random_state_kept() -> Iterator[Callable[[], None]]:
    """Yields a function that sets Python, NumPy, torch CPU and CUDA generators back to where they were (P6)."""
    states = _collect_rng_states()
    try:
        yield lambda: _set_rng_states(states)
    finally:
        _set_rng_states(states)


@contextmanager
def module_kept(module: nn.Module) -> Iterator[None]:
    """Modes, attributes, buffers, torchmetrics, generators and gradients are afterwards what they were (P3).

    Inside there are no gradients: those that accumulate are out of reach of an evaluator that calls `backward`.
    """
    attributes = [(vars(part), dict(vars(part))) for part in module.modules()]
    containers = [
        (value, _structure(value)) for _, own in attributes for value in own.values() if type(value) in _CONTAINERS
    ]
    tensors = [(tensor, tensor.detach().clone()) for part in module.modules() for tensor in _moved_tensors(part)]
    generators = [
        (value, state)
        for _, own in attributes
        for value in own.values()
        if (state := loaders.generator_state(value)) is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        parameters.reshard(module)  # P18: a forward leaves gathered parameters behind
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for now, before in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update({name: value for name, value in before.items() if now.get(name, now) is not value})
        for container, content in containers:
            _refill(container, content)
        for tensor, saved in tensors:
            # by its bits: batch norm moves its statistics without a new version
            if not torch.equal(tensor.detach(), saved):
                tensor.detach().copy_(saved)
        for generator, state in generators:
            loaders.set_generator_state(generator, state)


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
    model._sync_buffers()
    with replaced(model, require_forward_param_sync=False):
        yield


def _moved_tensors(part: nn.Module) -> list[Tensor]:
    """Tensors that a module may write in place while it is evaluated."""
    states = [getattr(part, name) for name in part._defaults] if isinstance(part, Metric) else []
    return [item for item in [*part._buffers.values(), *states] if isinstance(item, Tensor)]


def _structure(value: Any, depth: int = 3) -> Any:
    """A copy of nested containers that holds the very same leaves."""
    if depth == 0 or type(value) not in _CONTAINERS:
        return value
    if isinstance(value, dict):
        return type(value)((key, _structure(item, depth - 1)) for key, item in value.items())
    return type(value)(_structure(item, depth - 1) for item in value)


def _refill(container: Any, content: Any) -> None:
    if _is_same(container, content):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _is_same(a: Any, b: Any) -> bool:
    if a is b or type(a) not in _CONTAINERS or type(a) is not type(b):
        return a is b
    if isinstance(a, set):
        return bool(a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(_is_same(x, y) for x, y in zip(a, b, strict=True))
