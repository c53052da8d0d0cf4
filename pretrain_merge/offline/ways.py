"""From what a user names as the way to evaluate to a bench: a configuration, a function, a command, or Python objects.

This module knows files of LightningCLI and names of functions. It runs what the user named, and nothing else.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError
from pretrain_merge.offline.agreement import Output
from pretrain_merge.offline.candidates import Bench, FolderBench, Program
from pretrain_merge.offline.partial import fingerprint
from pretrain_merge.offline.tensors import Source
from pretrain_merge.offline.users_code import import_from_here
from pretrain_merge.offline.validating import ModuleBench

EvaluateLike: TypeAlias = str | Callable[[Path], Mapping[str, float]] | Sequence[Any]
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
_CONFIGS = (".yaml", ".yml")
# of a run's Trainer; the rest is about training, its logger and its checkpoints
_KEPT = ("accelerator", "precision", "limit_val_batches", "deterministic", "benchmark", "inference_mode", "plugins")


def bench(
    evaluate: EvaluateLike,
    outputs: Mapping[str, Output],
    ties: Mapping[str, str],
    base: Source | None,
    scratch: Path,
    options: Mapping[str, Any],
) -> Bench:
    """A way to evaluate, ready to be used.

    Args:
        evaluate: As `sweep_checkpoints` takes it.
        outputs: What a merge of the checkpoints has, as was agreed on.
        ties: Other names of tensors in it.
        base: Gives what they lack.
        scratch: Where folders may be made.
        options: Of merges into folders.

    Raises:
        ConfigError: It is none, or gives no module and data.
        MissingDependencyError: LightningCLI needs jsonargparse.
    """
    if isinstance(evaluate, str):
        # three readings of a text that cannot be confused: a file, a dotted name with a colon, words of a shell
        if evaluate.endswith(_CONFIGS):
            evaluate = _of_config(Path(evaluate))
        elif _FUNCTION.fullmatch(evaluate):
            evaluate = _of_function(evaluate)
        else:
            evaluate = Program(evaluate)
    # a module is callable too
    if callable(evaluate) and not hasattr(evaluate, "validation_step"):
        return FolderBench(evaluate, scratch, {**options, "base": base})
    parts = tuple(evaluate) if isinstance(evaluate, tuple | list) else (evaluate,)
    if not 1 <= len(parts) <= 3:
        raise ConfigError(
            f"evaluate: {len(parts)} things were given. Allowed: a module, its validation loaders or datamodule, and a "
            f"Trainer; or a function of a folder."
        )
    module, data, trainer = (*parts, None, None)[:3]
    return ModuleBench(module, data, {} if trainer is None else trainer, outputs, ties, base)


def described(evaluate: EvaluateLike) -> Any:
    """What tells a way from another one, as far as that can be known without running it."""
    if isinstance(evaluate, str):
        is_file = evaluate.endswith(_CONFIGS) and Path(evaluate).is_file()
        return [evaluate, fingerprint(evaluate)] if is_file else evaluate
    parts = evaluate if isinstance(evaluate, tuple | list) else (evaluate,)
    return [f"{type(part).__module__}.{type(part).__qualname__}" for part in parts]


def _of_function(name: str) -> Any:
    """What a function of the user's returns. As with `python -m`, modules of the current folder can be named."""
    module_name, _, function_name = name.partition(":")
    import_from_here()
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"evaluate: {name!r} is not there ({error}). Name a function of a module that can be imported from here, "
            f"as package.module:function."
        ) from error
    # once: a module that is built twice would draw other weights, and data be loaded twice
    found = function()
    if isinstance(found, tuple | list) or hasattr(found, "validation_step"):
        return found
    raise ConfigError(
        f"evaluate: {name} returned a {type(found).__name__}. Let it return a LightningModule and its validation "
        f"loaders (or datamodule), and a Trainer where that needs options."
    )


def _of_config(path: Path) -> tuple[Any, Any, Mapping[str, Any]]:
    """Module, datamodule and Trainer's options of a configuration, as LightningCLI saves it beside a run's logs."""
    try:
        import yaml
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs LightningCLI's libraries ({error}). Run: pip install 'pretrain-merge[cli]'"
        ) from error
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Name a configuration of LightningCLI.") from error
    values = plain.get("fit", plain) if isinstance(plain, dict) else None
    if not isinstance(values, dict) or not _names_classes(values):
        raise ConfigError(
            f"evaluate: {path} does not name a class_path for its model (and its data, if it has any). A configuration "
            f"of LightningCLI() does; that of a LightningCLI with fixed classes does not: name a function that returns "
            f"module and loaders instead, as package.module:function."
        )
    # not through LightningCLI: its Trainer would start the run's own loggers and devices
    trainer = values.get("trainer")
    options = {key: trainer[key] for key in _KEPT if key in trainer} if isinstance(trainer, dict) else {}
    known = {key: values[key] for key in ("model", "data", "seed_everything") if values.get(key) is not None}
    import_from_here()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            cli = LightningCLI(
                args=known, run=False, save_config_callback=None, auto_configure_optimizers=False,
                trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
            )  # fmt: skip
    except SystemExit as error:  # jsonargparse's way to say so
        raise ConfigError(f"evaluate: {path} is refused by LightningCLI, for the reason above. Mend it.") from error
    # not cli.trainer: its devices and strategy are the run's
    return cli.model, cli.datamodule, options


def _names_classes(values: Mapping[str, Any]) -> bool:
    parts = [values.get("model"), *([values["data"]] if values.get("data") is not None else [])]
    return all(isinstance(part, dict) and isinstance(part.get("class_path"), str) for part in parts)
