"""Merged models on disk: `model.safetensors` and the provenance of every number in it.

This module knows state dicts, safetensors and the folder layout. It knows no windows and no trainers: whatever weights
are in the module when it is called are the ones written. No pickle is written or read.
"""

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain_merge import __version__
from pretrain_merge.checkpoints.folders import published
from pretrain_merge.errors import CheckpointError
from pretrain_merge.notices import logger
from pretrain_merge.snapshot import plain_name

WEIGHTS = "model.safetensors"
PROVENANCE = "provenance.json"
_FORMAT = "pretrain-merge/1"
_RECORDED_VERSIONS = ("torch", "lightning", "safetensors")
_LISTED = 5
_EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def save_merged(module: nn.Module, target: Path, provenance: Mapping[str, Any]) -> None:
    """Write the weights that are in the module now, with their provenance, as a folder that appears whole.

    Where the module wraps one Hugging Face model and nothing else, names lose the wrapper's prefix and the model's
    `config.json` is added, so that `from_pretrained(target)` works.

    Args:
        module: The model; its whole state dict is written: merged parameters, frozen ones, buffers, and extra state
            (`get_extra_state`) that is a tensor.
        target: The folder to be made.
        provenance: Plain JSON values: steps, coefficients, configuration, metrics.

    Raises:
        CheckpointError: The folder exists, or cannot be written.
    """
    prefix, hugging_face = _wrapped_hugging_face_model(module)
    tensors, ties = _without_ties(_state(module, prefix))
    if left_out := [name for name, value in module.state_dict().items() if not isinstance(value, Tensor | None)]:
        logger.warning(
            f"{target} is saved without {', '.join(left_out)}: extra state that is no tensor could be written as a "
            f"pickle only. Return a tensor from get_extra_state."
        )
    about = {
        **provenance,
        "format": _FORMAT,
        "model": type(module).__name__,
        "prefix": prefix,
        "ties": ties,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "versions": {"pretrain-merge": __version__} | {name: version(name) for name in _RECORDED_VERSIONS},
    }
    with published(target) as folder:
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # no OSError, also where the disk is full
            raise OSError(error) from error
        if not _holds(folder / WEIGHTS, tensors):
            raise CheckpointError(f"{target}: what was read back is not what was written. Check that disk.")
        # P30: the order of safetensors' own metadata differs from run to run, so provenance is a file of its own
        (folder / PROVENANCE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if hugging_face is not None:
            hugging_face.config.save_pretrained(folder)
            if getattr(hugging_face, "generation_config", None) is not None:
                hugging_face.generation_config.save_pretrained(folder)


def holds_weights_of(module: nn.Module, target: Path) -> bool:
    """Whether a merged model on disk is, bit for bit, what is in the module now."""
    prefix, _ = _wrapped_hugging_face_model(module)
    return _holds(target / WEIGHTS, _without_ties(_state(module, prefix))[0])


@torch.no_grad()
def load_merged(module: nn.Module, path: str | Path) -> dict[str, Any]:
    """Read a merged model into a module, strictly: every name, shape and dtype must be there, and nothing else.

    Args:
        module: The model to write into, as it was when the merge was saved.
        path: A folder that `ModelMerging` saved (`…/merged/step-00001000-sma`).

    Returns:
        The provenance: steps, coefficients, configuration, versions, metrics.

    Raises:
        CheckpointError: The folder is no merged model, or belongs to another model; nothing was changed.
    """
    folder = Path(path)
    provenance = read_provenance(folder)
    prefix, ties = provenance["prefix"], provenance["ties"]
    wanted = _state(module, prefix)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            if not set(ties.values()) <= set(file.keys()):
                raise CheckpointError(f"{folder / PROVENANCE} is damaged: {ties}. Copy the folder again.")
            _refuse_other_model(folder, module, wanted, file, ties)
            extra_states = _modules_by_extra_state(module, prefix)
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if _is_extra_state(name):
                    extra_states[name].set_extra_state(file.get_tensor(name))
                else:
                    wanted[name].copy_(file.get_tensor(name))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}). Copy the folder again.") from error
    for alias, name in ties.items():
        if wanted[alias].data_ptr() != wanted[name].data_ptr():
            wanted[alias].copy_(wanted[name])
    return provenance


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a merged model.

    Raises:
        CheckpointError: The folder is no merged model.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no merged model ({error}). Name a folder that holds {WEIGHTS} and {PROVENANCE}, as "
            f"ModelMerging saves it under merged/."
        ) from error
    if not isinstance(provenance, dict) or provenance.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder / PROVENANCE} is not of format {_FORMAT!r}. Read it with the version that wrote it."
        )
    prefix, ties = provenance.get("prefix"), provenance.get("ties")
    if not isinstance(prefix, str) or not isinstance(ties, dict) or not all(isinstance(i, str) for i in ties.values()):
        raise CheckpointError(f"{folder / PROVENANCE} is damaged: {prefix=}, {ties=}. Copy the folder again.")
    return provenance


def _holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == tensors.keys() and all(
                _same_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items()
            )
    except (SafetensorError, OSError):
        return False


def _same_bits(a: Tensor, b: Tensor) -> bool:
    b = b.cpu()
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    state = {plain_name(name): value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in state.items()}


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _modules_by_extra_state(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    paths = ((f"{path}." if path else "", part) for path, part in module.named_modules())
    return {plain_name(f"{path}{_EXTRA_STATE}").removeprefix(prefix): part for path, part in paths}


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, under its first name (P22), and which other names it has."""
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if first.setdefault(identity, name) != name:
            ties[name] = first[identity]
    return {name: state[name].contiguous() for name in first.values()}, ties


def _wrapped_hugging_face_model(module: nn.Module) -> tuple[str, Any]:
    # a model of theirs exists only if this is imported, which takes most of a second
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return "", None
    names = [plain_name(name) for name in module.state_dict()]
    for path, part in module.named_modules():
        prefix = plain_name(f"{path}." if path else "")
        if isinstance(part, transformers.PreTrainedModel) and all(name.startswith(prefix) for name in names):
            return prefix, part
    return "", None


def _refuse_other_model(
    folder: Path, module: nn.Module, wanted: Mapping[str, Tensor], file: Any, ties: Mapping[str, str]
) -> None:
    stored = set(file.keys()) | set(ties)
    problems = [f"missing in the file: {name}" for name in sorted(wanted.keys() - stored)]
    problems += [f"not in the model: {name}" for name in sorted(stored - wanted.keys())]
    for name in sorted(set(file.keys()) & wanted.keys()):
        if _is_extra_state(name):
            continue  # its module says what it takes
        tensor = file.get_slice(name)
        shape, dtype = tuple(tensor.get_shape()), _TORCH_DTYPES.get(tensor.get_dtype())
        if (shape, dtype) != (tuple(wanted[name].shape), wanted[name].dtype):
            problems.append(
                f"{name}: {dtype} {shape} in the file, {wanted[name].dtype} {tuple(wanted[name].shape)} here"
            )
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{folder} does not fit {type(module).__name__}: {'; '.join(problems[:_LISTED])}{more}. Build the model "
            f"with the configuration and dtype it was trained with."
        )


_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
