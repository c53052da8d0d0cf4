"""The form that Hugging Face's `from_pretrained` reads: which models have it, and the files beside their weights.

This module knows transformers' models from the outside; it imports none of it. A model of theirs whose parameters were
renamed or replaced (adapters, pruning, quantisation) would come back with random weights and no error, so the form is
claimed only where the keys and shapes are those of a new model of that class and configuration.
"""

import copy
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.tensor_names import plain_name

_SAVED_BESIDE = ("config", "generation_config")
_said = WarnOnce()  # every merged model of a run has the same to say
_kinds: dict[tuple[type, str], Mapping[str, tuple[int, ...]] | str] = {}  # shapes by key, or why there are none


def wrapped_model(module: nn.Module) -> tuple[str, Any]:
    """The one model of theirs that a module wraps, and the prefix of its names; `"", None` where there is none."""
    # a model of theirs exists only if this is imported, which takes most of a second
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return "", None
    names = {plain_name(name): value for name, value in module.state_dict().items()}
    for path, part in module.named_modules():
        prefix = plain_name(f"{path}." if path else "")
        if isinstance(part, transformers.PreTrainedModel) and all(name.startswith(prefix) for name in names):
            own = {name.removeprefix(prefix): tuple(value.shape) for name, value in names.items() if _is_shaped(value)}
            reason = _why_not(part, own)
            if not reason:
                return prefix, part
            _said.warn(
                f"{type(part).__name__}: {reason}",
                f"merged models of this {type(part).__name__} are saved without config.json, for load_merged and not "
                f"for from_pretrained, which would start it with other weights: {reason}. Merge adapters and make "
                f"pruning permanent before training, or load with load_merged into the model as it is built here.",
            )
    return "", None


def save_configuration(model: Any, folder: Path) -> None:
    """Write `config.json`, and `generation_config.json` where there is one; say once what cannot be written.

    Args:
        model: A model of theirs.
        folder: Beside its weights.
    """
    for name in _SAVED_BESIDE:
        part = getattr(model, name, None)
        if part is None:
            continue
        try:
            part.save_pretrained(folder)
        except Exception as error:  # whatever their checks raise: the weights count
            (folder / f"{name}.json").unlink(missing_ok=True)
            _said.warn(
                f"{type(model).__name__}.{name}",
                f"merged models of this {type(model).__name__} are saved without {name}.json, since transformers "
                f"refuses its {name} ({' '.join(str(error).split())}). Correct it before training to have it saved.",
            )


def try_configuration(module: nn.Module) -> None:
    """Say before training what `save_configuration` will leave out."""
    _, model = wrapped_model(module)
    if model is not None:
        with tempfile.TemporaryDirectory() as folder:
            save_configuration(model, Path(folder))


def _is_shaped(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_nested


def _why_not(model: Any, own: Mapping[str, tuple[int, ...]]) -> str:
    """Why a new model of this class and configuration would not take these tensors; empty where it would."""
    try:
        kind = (type(model), model.config.to_json_string(use_diff=False))
    except Exception as error:
        return f"its configuration cannot be written ({' '.join(str(error).split())})"
    if kind not in _kinds:
        _kinds[kind] = _shapes_of_new(model)
    new = _kinds[kind]
    if isinstance(new, str):
        return f"transformers cannot build a new one from its configuration ({new})"
    differing = sorted(name for name in own.keys() | new.keys() if own.get(name) != new.get(name))
    if not differing:
        return ""
    name = differing[0]
    return f"{name} is {own.get(name, 'missing')} here and {new.get(name, 'missing')} in a new one"


def _shapes_of_new(model: Any) -> Mapping[str, tuple[int, ...]] | str:
    try:
        with _random_numbers_untouched(), torch.device("meta"):
            new = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        return " ".join(str(error).split())
    return {name: tuple(value.shape) for name, value in new.state_dict().items() if isinstance(value, Tensor)}


@contextmanager
def _random_numbers_untouched() -> Iterator[None]:
    """Building a model draws weights, and training must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
