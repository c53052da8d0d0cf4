"""What is refused before the first batch, with the reason and the way out. This module knows no files and no window."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from pretrain_merge.config import MergeConfig
from pretrain_merge.errors import ConfigError, UnsupportedModelError
from pretrain_merge.evaluation.evaluate import Evaluator
from pretrain_merge.merged_models.merged import try_saving
from pretrain_merge.merged_models.retention import will_save
from pretrain_merge.parameters import mergeable_tensors
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.errands import Work

_REFUSED_STRATEGIES = {
    "FSDPStrategy": "FSDP1 flattens parameters, also with use_orig_params=True; use FSDP2 (ModelParallelStrategy)",
    "DeepSpeedStrategy": "DeepSpeed's engine owns parameters and optimizer at every ZeRO stage; use DDP, or FSDP2 "
    "(ModelParallelStrategy) where the model outgrows a device",
}
_OF_A_RANK = ("store", "store_folder")  # hosts may have other memory and other disks


def refuse_strategy(strategy: Any) -> None:
    """Refuse strategies whose parameters cannot be merged in place (P19).

    Raises:
        UnsupportedModelError: It is one of them.
    """
    # by name along the bases: a user's subclass is refused too, and DeepSpeed need not be installed
    kinds = [kind.__name__ for kind in type(strategy).__mro__]
    refused = next((kind for kind in kinds if kind in _REFUSED_STRATEGIES), None)
    if refused:
        raise UnsupportedModelError(f"{refused} is not supported: {_REFUSED_STRATEGIES[refused]}.")


def refuse_model(module: Any, optimizers: Iterable[Any], config: MergeConfig) -> None:
    """Refuse a model that cannot be merged exactly.

    Raises:
        UnsupportedModelError: It has parameters or buffers for which that holds, or one of its optimizers.
        CheckpointError: A merged model of it could not be saved.
    """
    mergeable_tensors(
        module, merge_buffers=config.merge_buffers, batch_norm=config.batch_norm, **asdict(config.parameters)
    )
    for optimizer in optimizers:
        _refuse_own_average(optimizer)
    # now, since a run of weeks would else fail at its first save
    if will_save(config.save):
        try_saving(module)


def refuse_other_configs(config: MergeConfig) -> None:
    """Refuse ranks that were given different keys; collective.

    Those that snapshot at other steps would wait for each other: a file may be stale on one node.

    Raises:
        ConfigError: A key differs.
    """
    of_ranks = ranks.gather(_comparable(asdict(config)))
    for key, value in of_ranks[0].items():
        other = next((number for number, item in enumerate(of_ranks) if item[key] != value), None)
        if other is not None and key not in _OF_A_RANK:
            raise ConfigError(
                f"{key}: {value!r} on rank 0 and {of_ranks[other][key]!r} on rank {other}. All ranks need the same; "
                f"only {' and '.join(_OF_A_RANK)} may differ. Copy the configuration to every node."
            )


def checked_evaluators(evaluators: object) -> dict[str, Evaluator]:
    """The evaluators by name.

    Raises:
        ConfigError: It does not map names to functions.
    """
    if evaluators is None:
        return {}
    if not isinstance(evaluators, Mapping) or not all(callable(item) for item in evaluators.values()):
        raise ConfigError(
            f"evaluators: {evaluators!r} does not name functions. Allowed: a mapping from names to functions that take "
            f"the module and return metrics, such as {{'norm': weight_norm}}."
        )
    return dict(evaluators)


def checked_on_publish(work: Work | None, config: MergeConfig) -> Work | None:
    """What is done with each saved model.

    Raises:
        ConfigError: It is neither a command nor a function, or nothing is saved.
    """
    if work is not None and not isinstance(work, str) and not callable(work):
        raise ConfigError(
            f"on_publish: {work!r} is neither a command nor a function. Allowed: text such as 'python evaluate.py "
            f"{{folder}}', or a function of the folder and the step."
        )
    if work is not None and not will_save(config.save):
        raise ConfigError(
            "on_publish: given, and no merged model will be saved. Say which by save: {every, best or at_end}."
        )
    return work


def _refuse_own_average(optimizer: Any) -> None:
    # Between steps the model holds Schedule-Free's y. A mean of y is neither its average x nor a mean of x, and a
    # validation hook that calls `optimizer.eval()` would take merged weights for y.
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise UnsupportedModelError(
            f"{type(optimizer).__name__} switches the model between training weights and an average of its own (it has "
            f"train() and eval()), so a merge of what is in the model means nothing. Allowed: optimizers whose weights "
            f"stay. Train with AdamW at a constant rate to merge; or keep this optimizer's own average and leave "
            f"ModelMerging out. In a loop of your own, RollingMerger merges its averages: optimizer.eval(); "
            f"merger.observe(model, step); optimizer.train()."
        )


def _comparable(value: Any) -> Any:
    """As other processes can have it: a function (the shape of a decay) by its name."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value
