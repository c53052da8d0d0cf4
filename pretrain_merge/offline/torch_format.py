"""What `torch.save` wrote as a checkpoint: Lightning's `.ckpt`, `.pt` and `.bin` files.

This module knows under which keys people keep a model and its optimizer. The file itself is `torch_archive`'s business.
"""

from collections.abc import Mapping
from types import UnionType
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.plain_pickle import Inert
from pretrain_merge.offline.tensors import Block, Kind, Source
from pretrain_merge.offline.torch_archive import Archive, open_archive
from pretrain_merge.offline.torch_objects import OtherTensor, StoredTensor

_LARGEST_RATE = 1e9
# where a file that is not one flat state dict keeps the model; the first that is there is taken
_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")


def open_file(path: str) -> Source:
    """A `.ckpt`, `.pt` or `.bin` file as a checkpoint.

    Raises:
        CheckpointError: It cannot be read as plain data, or holds no state dict.
    """
    size = size_of(path)
    if size is None:
        raise CheckpointError(f"{path} is missing. Name a file that is there.")
    with Files() as files:
        archive = open_archive(path, files, 0, size)
    content = archive.content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}. A state dict, or a dict with one, is needed.")
    tensors, ties, places = _named(_state_dict(path, content), archive)
    found = optimizer_tensors(content, StoredTensor | OtherTensor)
    # all or none: an average that left some out would be resumed with those of one source
    are_dense = all(isinstance(state, StoredTensor) for state in found.values())
    states, _, places_of_states = _named(found if are_dense else {}, archive)
    step = content.get("global_step")
    is_lightning = "pytorch-lightning_version" in content
    return Source(
        path,
        "lightning" if is_lightning else "torch",
        tensors,
        lambda name: [(places | places_of_states)[name]],
        (path,),
        ties=ties,
        step=step if type(step) is int else None,
        lr=learning_rates(content) if is_lightning else (),
        optimizer=states if is_lightning else {},
    )


def optimizer_tensors(content: Mapping[str, Any], kind: type | UnionType) -> dict[str, Any]:
    """Tensors of a Lightning checkpoint's optimizer states, by where they belong.

    Args:
        content: Of the file.
        kind: What its tensors are: `StoredTensor`, or torch's own.
    """
    found = {}
    # any shape of state is taken: optimizers of others keep lists and numbers beside tensors
    for number, optimizer in enumerate(_dicts(content, "optimizer_states")):
        state = optimizer.get("state")
        for key, values in state.items() if isinstance(state, dict) else ():
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, kind):
                    found[f"optimizer_states/{number}/{key}/{name}"] = value
    return found


def learning_rates(content: Mapping[str, Any]) -> tuple[float, ...]:
    """Of a Lightning checkpoint: those of its optimizers, else those that its schedulers set last."""
    groups = [group for state in _dicts(content, "optimizer_states") for group in _dicts(state, "param_groups")]
    found: list[Any] = [group.get("lr") for group in groups]
    if not found:  # sharded checkpoints keep the states of optimizers elsewhere
        found = [rate for state in _dicts(content, "lr_schedulers") for rate in _listed(state.get("_last_lr"))]
    # a rate that is a tensor has no value here
    are_rates = all(type(rate) in (int, float) and abs(rate) < _LARGEST_RATE for rate in found)
    return tuple(map(float, found)) if are_rates else ()


def _dicts(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [item for item in _listed(content.get(key)) if isinstance(item, dict)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []  # a crafted file has anything there


def _state_dict(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    for key in _MODEL_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and (found := _tensors_of(inner)):
            return found
    found = _tensors_of(content)
    if not found:
        raise CheckpointError(
            f"{path} holds no state dict: its keys are {', '.join(map(str, list(content)[:8])) or 'none'}. Allowed: "
            f"names and tensors, or these under one of {', '.join(_MODEL_KEYS)}. Save the state dict alone."
        )
    return found


def _tensors_of(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    found = {str(name): value for name, value in mapping.items() if isinstance(value, StoredTensor | OtherTensor)}
    # beside tensors, what an array or a class of its own held may be a weight too
    others = {str(name): value for name, value in mapping.items() if isinstance(value, Inert)}
    return found | others if found else {}


def _named(tensors: Mapping[str, Any], archive: Archive) -> tuple[dict[str, Kind], dict[str, str], dict[str, Block]]:
    """Kinds, other names of tied tensors, and places."""
    kinds: dict[str, Kind] = {}
    ties: dict[str, str] = {}
    places: dict[str, Block] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, StoredTensor):
            what = tensor.what if isinstance(tensor, OtherTensor) else f"a {tensor.path}"
            raise CheckpointError(
                f"{name} is {what}. Dense tensors can be merged: leave it out of the state dict, or make it dense."
            )
        block = archive.block(tensor)
        # tied weights are one storage, saved once; views of it that differ are tensors of their own
        identity = (block.start, block.shape, block.strides, tensor.kind.dtype) if tensor.kind.num_elements else name
        if first.setdefault(identity, name) != name:
            ties[name] = first[identity]
            continue
        kinds[name], places[name] = tensor.kind, block
    return kinds, ties, places
