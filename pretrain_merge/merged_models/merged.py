"""Merged models on disk: their weights as safetensors and the provenance of every number in them.

This module knows state dicts, names and the folder layout; how tensors get into files and back is `consolidated`. It
knows no windows and no trainers: whatever weights are in the module when it is called are the ones written. No pickle
is written or read. On several ranks every rank calls its functions at the same point.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_merge import parameters
from pretrain_merge._version import __version__
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files.folders import published
from pretrain_merge.merged_models import whole_weights
from pretrain_merge.merged_models.whole_weights import LARGEST_FILE, WEIGHTS, Weights
from pretrain_merge.parameters.shards import plain_name
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger

PROVENANCE = "provenance.json"
_FORMAT = "pretrain-merge/1"
_RECORDED_VERSIONS = ("torch", "lightning", "safetensors")
_LISTED = 5
_EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def save_merged(
    module: nn.Module, target: Path, provenance: Mapping[str, Any], *, largest_file: int = LARGEST_FILE
) -> None:
    """Write the weights that are in the module now, with their provenance, as a folder that appears whole.

    Every rank calls it: where the module is sharded each writes its shards, else rank 0 writes for all. Either way the
    folder holds whole tensors for one process to read. Where the module wraps one Hugging Face model and nothing else,
    names lose the wrapper's prefix and the model's `config.json` is added, so that `from_pretrained(target)` works.

    Args:
        module: The model; its whole state dict is written: merged parameters, frozen ones, buffers, and extra state
            (`get_extra_state`) that is a tensor.
        target: The folder to be made.
        provenance: Plain JSON values: steps, coefficients, configuration, metrics.
        largest_file: Bytes after which the weights go on in another file, with an index beside them.

    Raises:
        CheckpointError: The folder exists, or cannot be written.
        RankError: That happened on another rank.
    """
    prefix, hugging_face = _wrapped_hugging_face_model(module)
    tensors, ties = _without_ties(_state(module, prefix), is_sharded=parameters.is_sharded(module))
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
    with _published_by_rank_0(target) as folder:
        is_writer = ranks.rank() == 0 or parameters.is_sharded(module)
        with ranks.together(f"write {target}"):
            if is_writer:
                whole_weights.write(folder, tensors, largest_file=largest_file)
        with ranks.together(f"read {target} back"):
            if is_writer and not whole_weights.hold(folder, tensors):
                raise CheckpointError(f"{target}: what was read back is not what was written. Check that disk.")
        if ranks.rank() == 0:
            whole_weights.remove_parts(folder)
            # P30: the order of safetensors' own metadata differs from run to run, so provenance is a file of its own
            (folder / PROVENANCE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if hugging_face is not None:
                hugging_face.config.save_pretrained(folder)
                if getattr(hugging_face, "generation_config", None) is not None:
                    hugging_face.generation_config.save_pretrained(folder)


def holds_weights_of(module: nn.Module, target: Path) -> bool:
    """Whether a merged model on disk is, bit for bit, what is in the module now; the same answer on every rank."""
    prefix, _ = _wrapped_hugging_face_model(module)
    is_sharded = parameters.is_sharded(module)
    tensors, _ = _without_ties(_state(module, prefix), is_sharded=is_sharded)
    is_reader = ranks.rank() == 0 or is_sharded
    return not ranks.any_rank(is_reader and not whole_weights.hold(target, tensors))


@contextmanager
def _published_by_rank_0(target: Path) -> Iterator[Path]:
    """`published` on rank 0; the others get its temporary folder to write in."""
    with ranks.together(f"save {target}"), ExitStack() as publishing:
        with ranks.together(f"make a folder for {target}"):
            own = publishing.enter_context(published(target)) if ranks.rank() == 0 else None
        try:
            yield ranks.gather(own)[0] or target
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"cannot write {target}: {error}. Free space there, or choose another folder."
            ) from error


@torch.no_grad()
def load_merged(module: nn.Module, path: str | Path) -> dict[str, Any]:
    """Read a merged model into a module, strictly: every name, shape and dtype must be there, and nothing else.

    Args:
        module: The model to write into, as it was when the merge was saved.
        path: A folder that `ModelMerging` saved (`…/merged/step-00001000-sma`), of whatever number of ranks. A module
            that is sharded over ranks takes its own shards on each; no rank waits for another.

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
        with whole_weights.opened(folder) as weights:
            if not set(ties.values()) <= weights.names():
                raise CheckpointError(f"{folder / PROVENANCE} is damaged: {ties}. Copy the folder again.")
            _refuse_other_model(folder, module, wanted, weights, ties)
            extra_states = _modules_by_extra_state(module, prefix)
            for name in sorted(weights.names()):
                if _is_extra_state(name):
                    extra_states[name].set_extra_state(weights.whole(name))
                else:
                    whole_weights.local(wanted[name]).copy_(weights.like(name, wanted[name]))
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}). Copy the folder again.") from error
    for alias, name in ties.items():
        if _memory(wanted[alias]) != _memory(wanted[name]):
            whole_weights.local(wanted[alias]).copy_(whole_weights.local(wanted[name]))
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


def _state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    parameters.reshard(module)  # P18
    state = {plain_name(name): value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in state.items()}


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _modules_by_extra_state(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    paths = ((f"{path}." if path else "", part) for path, part in module.named_modules())
    return {plain_name(f"{path}{_EXTRA_STATE}").removeprefix(prefix): part for path, part in paths}


def _without_ties(state: Mapping[str, Tensor], *, is_sharded: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, under its first name (P22), and which other names it has."""
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        identity = _memory(tensor) if tensor.numel() else name
        if first.setdefault(identity, name) != name:
            ties[name] = first[identity]
    if is_sharded:
        ties = ranks.gather(ties)[0]  # memory tells nothing where a rank's shard is empty, and rank 0 has the most
    return {name: tensor.contiguous() for name, tensor in state.items() if name not in ties}, ties


def _memory(tensor: Tensor) -> object:
    """Where it lies and how."""
    own = whole_weights.local(tensor)
    return own.data_ptr(), tensor.shape, own.stride()


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
    folder: Path, module: nn.Module, wanted: Mapping[str, Tensor], weights: Weights, ties: Mapping[str, str]
) -> None:
    stored = weights.names() | set(ties)
    problems = [f"missing in the file: {name}" for name in sorted(wanted.keys() - stored)]
    problems += [f"not in the model: {name}" for name in sorted(stored - wanted.keys())]
    for name in sorted(weights.names() & wanted.keys()):
        if _is_extra_state(name):
            continue  # its module says what it takes
        shape, spelled = weights.kind(name)
        dtype = _TORCH_DTYPES.get(spelled)
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
