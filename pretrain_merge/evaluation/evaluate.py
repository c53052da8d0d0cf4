"""Paired evaluation: raw and merged weights on the same batches, without the run noticing.

This module knows Lightning's evaluation loop and nothing of windows or coefficients. It runs an evaluation loop of its
own, of Lightning's class, so that a metric means here exactly what it means in the user's own validation: batch-size
weights, several loaders, torchmetrics, precision and strategy. Everything that such a loop touches in the Trainer is a
stand-in while it runs (`isolation`), loaders are iterated by iterators of our own (`loaders`), and what hooks change in
objects is put back after each pass (`memento`).

On several ranks Lightning's own syncing of `self.log` is off: each rank measures its part of the data, and all metrics
are reduced together once, after the pass, whether or not the user asked for `sync_dist`. Objects of torchmetrics sync
themselves, as in any validation. Before each batch the ranks agree to go on (`lockstep`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from tqdm import tqdm

from pretrain_merge import parameters
from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import isolation, reduction
from pretrain_merge.evaluation.loaders import RepeatedLoaders, refuse_loaders
from pretrain_merge.evaluation.lockstep import Lockstep
from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.evaluation.reduction import How, Part
from pretrain_merge.evaluation.settings import settings_kept
from pretrain_merge.evaluation.users_code import users_code
from pretrain_merge.runtime import ranks, signals
from pretrain_merge.runtime.evaluating import evaluating_merge
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.runtime.random_state import random_state_kept

Evaluator = Callable[[Any], Mapping[str, float]]
# A rank that fails between the layers of a sharded forward cannot tell the others, who wait for its shards.
_PATIENCE = timedelta(minutes=1)


class Measure(Protocol):
    """Evaluates the live model on all ranks' data, with a label for the progress bar."""

    def __call__(self, label: str) -> dict[str, float]:
        """The metrics by name."""


@contextmanager
def isolated(
    trainer: Any,
    module: Any,
    *,
    evaluators: Mapping[str, Evaluator] | None = None,
    validate: bool = True,
    stateful_data: str = "refuse",
    merged: Iterable[Tensor] = (),
    notices: WarnOnce | None = None,
) -> Iterator[Measure]:
    """Evaluate the live model, as often as needed, each time on the same batches with the same random numbers.

    A checkpoint that a hook or an evaluator asks for meanwhile is written after the block.

    Args:
        trainer: A Trainer inside `fit`, between two training batches.
        module: Its LightningModule.
        evaluators: Further evaluations by name; each gets the module in eval mode and returns metrics.
        validate: Whether to run the module's `validation_step` on the Trainer's validation loaders.
        stateful_data: "refuse" loaders that carry a position of their own, or "iterate" them.
        merged: Live tensors whose values the caller changes between evaluations, and puts back itself.
        notices: What the user was told already.

    Yields:
        A function that gives metrics: those of the validation loop under the names that `trainer.callback_metrics`
        would use, those of evaluators as `<evaluator>/<key>`; of all ranks, the same on each.

    Raises:
        EvaluationError: The loaders gave other batches than the first time, or a metric is not a number.
        RankError: Something failed on another rank.
    """
    notices = notices or WarnOnce()
    with ExitStack() as stack:
        stack.enter_context(isolation.checkpoints_wait(trainer, notices))
        random_state = stack.enter_context(random_state_kept())
        data = _repeated_data(trainer, module, stateful_data, notices) if validate else None
        bar = stack.enter_context(_progress_bar(trainer, data))
        stack.enter_context(isolation.stubbed_trainer(trainer))
        parameters.reshard(module)
        memento = Memento(parts_of(trainer, module, data), merged=merged, notices=notices)

        def measure(label: str) -> dict[str, float]:
            parts: dict[str, Part] = {}
            is_sharded = parameters.is_sharded(module)
            on_all_ranks = ranks.all_or_none(f"evaluate {label}", patience=_PATIENCE if is_sharded else None)
            with on_all_ranks, torch.no_grad(), ExitStack() as kept:
                kept.enter_context(isolation.gradients_hidden(module))  # which fit when all parameters are in place
                kept.callback(memento.put_back)
                kept.callback(parameters.reshard, module)  # P18: a forward leaves gathered parameters behind
                kept.enter_context(settings_kept())
                kept.enter_context(evaluating_merge())
                lockstep = Lockstep(is_sharded=is_sharded)
                lockstep.start()
                kept.enter_context(isolation.buffers_of_rank_0(trainer.strategy.model))
                bar.reset()
                bar.set_description(f"evaluating {label}")
                kept.enter_context(users_code())
                if data is not None:
                    random_state()
                    parts |= _validate(trainer, data, bar, lockstep)
                for name, evaluator in (evaluators or {}).items():
                    random_state()
                    module.eval()
                    with signals.keyboard_interrupt_allowed():
                        values = evaluator(module)
                    parts |= {f"{name}/{key}": Part(value) for key, value in _numbers(name, values).items()}
            return reduction.over_ranks(parts)

        yield measure


def refuse_given_loaders(trainer: Any, *, stateful_data: str) -> None:
    """Before anything is read: refuse loaders given to `fit` that a merge could not read without a trace.

    Raises:
        EvaluationError: One of them is such.
    """
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    # what a hook returns is not known yet, and asking calls the user's code
    if trainer.enable_validation and not source.is_module():
        given = getattr(source.instance, "flattened", None) or tree_flatten(source.instance)[0]
        refuse_loaders(given, stateful_data=stateful_data)


def refuse_loaders_of_hooks(trainer: Any, module: Any, *, stateful_data: str, notices: WarnOnce) -> None:
    """Before the first step: refuse those that hooks return, which Lightning has mostly asked by now. Collective.

    Raises:
        EvaluationError: One of them is such.
    """
    with random_state_kept():
        _repeated_data(trainer, module, stateful_data, notices)


def data_share(trainer: Any) -> float:
    """Data-parallel replicas per rank: below 1 under tensor parallelism, where several ranks read the same batch."""
    sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": trainer.world_size}
    return float(sampler["num_replicas"]) / float(trainer.world_size)


def _validate(trainer: Any, data: RepeatedLoaders, bar: Any, lockstep: Lockstep) -> dict[str, Part]:
    """One run of Lightning's evaluation loop, on loaders, results and counters of its own."""
    users_loop = trainer.fit_loop.epoch_loop.val_loop
    loop = _new_loop(trainer, users_loop)
    ways = _unsynced(loop._results, data_share(trainer))
    loop._combined_loader = data.combined(on_batch=lambda: bar.update(1))
    loop._max_batches = list(data.max_batches)
    loop._last_val_dl_reload_epoch = trainer.current_epoch  # this loop's loaders are never reloaded
    connector = type(trainer._logger_connector)(trainer)
    inherited = dict(trainer._logger_connector._callback_metrics)
    connector._callback_metrics = dict(inherited)
    connector._logged_metrics = dict(trainer._logger_connector._logged_metrics)
    connector._progress_bar_metrics = dict(trainer._logger_connector._progress_bar_metrics)
    with (
        isolation.replaced(trainer.fit_loop.epoch_loop, val_loop=loop),
        isolation.replaced(trainer, _logger_connector=connector),
    ):
        try:
            with signals.keyboard_interrupt_allowed():
                lockstep.run(loop)
        finally:
            loop.teardown()
    data.end_pass()
    measured = connector._callback_metrics
    own = _numbers("validation", {key: item for key, item in measured.items() if item is not inherited.get(key)})
    return {key: Part(value, *ways.get(key, (1.0, "mean"))) for key, value in own.items()}


def _unsynced(results: Any, share: float) -> dict[str, tuple[float, How]]:
    """Keep Lightning from syncing what is logged; filled during the pass: by name, how it adds up over ranks."""
    ways: dict[str, tuple[float, How]] = {}
    log, metrics = results.log, results.metrics

    def log_alone(*arguments: Any, **options: Any) -> None:
        # and not `sync_dist=False`, which is remarked upon; torchmetrics' own are not touched by it
        log(*arguments, **options | {"sync_dist": True, "sync_dist_fn": _not_synced})

    def metrics_and_ways(on_step: bool) -> Any:
        found = metrics(on_step)
        for _, item in results.valid_items() if not on_step else ():
            ways.update(dict.fromkeys(results._forked_name(item, on_step), _way(item, share)))
        return found

    results.log, results.metrics = log_alone, metrics_and_ways
    return ways


def _not_synced(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _way(item: Any, share: float) -> tuple[float, How]:
    meta = item.meta
    if not item.is_tensor:
        return 1.0, "mean"  # of torchmetrics, and the same on every rank by now
    if meta.is_mean_reduction:
        return float(item.cumulated_batch_size), "mean"
    return (share, "sum") if meta.is_sum_reduction else (1.0, "max" if meta.is_max_reduction else "min")


def _new_loop(trainer: Any, users_loop: Any) -> Any:
    # of the same class as the Trainer's own loop, whether that is lightning's or pytorch_lightning's;
    # no inference_mode: its tensors would outlive the pass in users' caches
    return type(users_loop)(trainer, users_loop._trainer_fn, users_loop._stage, verbose=False, inference_mode=False)


def _numbers(source: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"{source} gave {metrics!r}, of which not every value is a number. Return a mapping from names to numbers "
            f"or one-element tensors."
        ) from error


def parts_of(trainer: Any, module: Any, data: RepeatedLoaders | None = None) -> dict[str, Any]:
    """What a hook can reach of a run, by the names that a user gives it; first what is nearest to the weights."""
    parts = {
        "module": module,
        "trainer.optimizers": trainer.optimizers,
        "trainer.lr_scheduler_configs": trainer.lr_scheduler_configs,
        "trainer.strategy": trainer.strategy,  # which has the list of optimizers
        "scaler": getattr(trainer.precision_plugin, "scaler", None),
        "trainer.datamodule": trainer.datamodule,
        "trainer.val_dataloaders": data.loaders if data is not None else None,
        "trainer.train_dataloader": trainer.train_dataloader,
        "trainer.callbacks": trainer.callbacks,
        "trainer": trainer,
        "torch's hooks of all modules": [
            hooks for name, hooks in vars(torch.nn.modules.module).items() if name.startswith("_global_")
        ],
    }
    return {name: part for name, part in parts.items() if part is not None}


def _repeated_data(trainer: Any, module: Any, stateful_data: str, notices: WarnOnce) -> RepeatedLoaders | None:
    users_loop = trainer.fit_loop.epoch_loop.val_loop
    # Lightning's own exchanges among the loaders are out of step where it refuses one of them on one rank
    with ranks.all_or_none("set up the validation loaders", patience=_PATIENCE):
        combined, max_batches = users_loop._combined_loader, users_loop._max_batches
        if combined is None and trainer.enable_validation:
            # the user's loop has not asked for its loaders yet: ask for ours alone, so that it asks as it would have
            loop = _new_loop(trainer, users_loop)
            loop._data_source = users_loop._data_source
            merged = dict(parameters.named_parameters(module)).values()
            memento = Memento(parts_of(trainer, module), merged=merged, notices=notices)
            with isolation.stage(trainer, "validating"):
                loop.setup_data()
            memento.put_back()
            combined, max_batches = loop._combined_loader, loop._max_batches
        num_with_data, *_ = ranks.count(combined is not None and sum(max_batches) > 0)
    return RepeatedLoaders(combined, max_batches, stateful_data=stateful_data) if num_with_data else None


@contextmanager
def _progress_bar(trainer: Any, data: RepeatedLoaders | None) -> Iterator[Any]:
    """A bar below the user's own, of its kind; none where the user has none."""
    users_bar = trainer.progress_bar_callback
    # a bar of the user's own making may say nothing of itself (and Lightning's own documentation shows such)
    shown = getattr(users_bar, "is_enabled", False) is True and trainer.is_global_zero
    total = data.num_batches if data is not None else None
    if shown and getattr(users_bar, "progress", None) is not None:  # rich: a second bar of another kind would break it
        task = users_bar.progress.add_task("", total=math.inf if total is None else total)
        try:
            yield _RichTask(users_bar.progress, task)
        finally:
            # hidden and not removed: Lightning finds its own bars by their place
            users_bar.progress.update(task, visible=False)
        return
    with tqdm(disable=not shown, total=total, leave=False, unit="batch", dynamic_ncols=True) as bar:
        yield bar


class _RichTask:
    """A line of rich's display, with tqdm's methods."""

    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def reset(self) -> None:
        self._progress.reset(self._task)

    def set_description(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def update(self, number: int) -> None:
        self._progress.advance(self._task, number)
