"""Folders of `torch.distributed.checkpoint`, by any number of ranks: torchtitan's, Lightning's sharded checkpoints.

This module knows which boxes of tensors lie where, and which of them are the model. The files are looked into when a
tensor of theirs is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline import torch_format
from pretrain_merge.offline.dcp_metadata import read_metadata
from pretrain_merge.offline.files import Files, join, size_of
from pretrain_merge.offline.safetensors_format import whole_shape
from pretrain_merge.offline.tensors import Block, Dtype, Kind, Source
from pretrain_merge.offline.torch_archive import open_archive
from pretrain_merge.offline.torch_objects import StoredTensor

_LIGHTNING_META = "meta.pt"
# the parts of a training state that are not the model, by the first word of a name; torchtitan's and common ones
_NOT_THE_MODEL = ("optimizer", "optim", "lr_scheduler", "scheduler", "train_state", "dataloader", "rng", "step")
_MODEL_PARTS = ("state_dict", "model", "app.model")  # Lightning's; the usual one


def open_folder(place: str, path: str) -> Source:
    """A folder, by its `.metadata`.

    Raises:
        CheckpointError: It is damaged, more than plain data, or holds no model.
    """
    metadata = read_metadata(path)
    try:
        stored = _tensors(metadata)
        kinds, parts = {name: item[0] for name, item in stored.items()}, _paths(metadata, stored)
        infos = {(index.fqn, _offsets(index)): info for index, info in metadata.storage_data.items()}
        chunks = {
            name: [(offsets, shape, _place(place, infos[name, offsets])) for offsets, shape in item[1]]
            for name, item in stored.items()
        }
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged, or of a storage other than DCP's own ({type(error).__name__}: {error}). Copy the "
            f"folder again."
        ) from error
    # before anything is read: a copy that was broken off lacks whole files mostly
    _refuse_short_files(chunks)
    for name, kind in kinds.items():
        boxes = [Block("", 0, offsets, shape) for offsets, shape, _ in chunks[name]]
        # what a rank never wrote would be read as whatever the buffer held
        if whole_shape(place, name, boxes) != kind.shape:
            raise CheckpointError(f"{place} does not hold all of {name!r} ({kind}). Copy the folder again.")
    model = _model_names(place, parts)
    optimizer = _optimizer_names(parts)
    names = {own: name for name, own in (model | optimizer).items()}
    files = sorted({file for of_tensor in chunks.values() for _, _, (file, _, _) in of_tensor})
    meta = _lightning_meta(place)
    step = meta.get("global_step")
    return Source(
        place,
        "dcp",
        {own: kinds[name] for name, own in model.items()},
        lambda own: _blocks(chunks[names[own]], kinds[names[own]]),
        tuple(files),
        step=step if type(step) is int else None,
        lr=torch_format.learning_rates(meta),
        optimizer={own: kinds[name] for name, own in optimizer.items()},
    )


_Chunk = tuple[tuple[int, ...], tuple[int, ...], tuple[str, int, int]]  # offsets, shape, (file, first byte, bytes)


def _tensors(metadata: Any) -> dict[str, tuple[Kind, list[tuple[tuple[int, ...], tuple[int, ...]]]]]:
    """By name: the whole tensor, and offsets and shape of each of its boxes."""
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):  # bytes, which are pickles
            continue
        properties = entry.properties
        dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
        if not isinstance(dtype, Dtype):
            raise TypeError(f"{name!r} is of dtype {dtype!r}")
        # replicas are listed once for each rank that had one
        boxes = [(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in entry.chunks]
        found[str(name)] = (Kind(_numbers(entry.size), dtype), list(dict.fromkeys(boxes)))
    return found


def _refuse_short_files(chunks: Mapping[str, Sequence[_Chunk]]) -> None:
    needed: dict[str, int] = {}
    for of_tensor in chunks.values():
        for _, _, (file, start, length) in of_tensor:
            needed[file] = max(needed.get(file, 0), start + length)
    for file, end in needed.items():
        size = size_of(file)
        if size is None or size < end:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file} {found}, and its metadata need {end}. Copy the folder again.")


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return numbers


def _offsets(index: Any) -> tuple[int, ...]:
    offsets = getattr(index, "offset", None)
    return () if offsets is None else _numbers(offsets)


def _place(folder: str, info: Any) -> tuple[str, int, int]:
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"its files are transformed ({info.transform_descriptors}), as by compression")
    name = info.relative_path
    if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/") or "://" in name:
        raise ValueError(f"it names {name!r}, which lies elsewhere")
    start, length = _numbers((info.offset, info.length))
    return join(folder, name), start, length


def _paths(metadata: Any, stored: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Where each tensor was in the nested state; DCP flattens it."""
    planner = getattr(metadata, "planner_data", None)
    known = planner if isinstance(planner, Mapping) else {}
    return {name: tuple(map(str, known.get(name, (name,)))) for name in stored}


def _model_names(place: str, paths: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The tensors of the model, and their names in it."""
    # with a model under its own word, whatever else lies beside it is not the model, by whichever name
    for part in _MODEL_PARTS:
        inner = {name: ".".join(path[1:]) for name, path in paths.items() if len(path) > 1 and path[0] == part}
        if inner:
            return inner
    found = {name: ".".join(path) for name, path in paths.items() if path[0].partition(".")[0] not in _NOT_THE_MODEL}
    if not found:
        parts = ", ".join(sorted({path[0] for path in paths.values()})[:8])
        raise CheckpointError(
            f"{place} holds no model: its parts are {parts or 'none'}. Allowed: tensors by name, alone or under one of "
            f"{', '.join(_MODEL_PARTS)}."
        )
    return found


def _optimizer_names(paths: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: "/".join(path) for name, path in paths.items() if path[0].partition(".")[0].startswith(("optim",))}


def _blocks(chunks: Sequence[_Chunk], kind: Kind) -> list[Block]:
    """Looks into the files: each chunk was written by `torch.save`, or as a safetensors file of its own."""
    found = []
    with Files() as files:
        for offsets, shape, (file, start, length) in chunks:
            archive = open_archive(file, files, start, length)
            tensor = archive.content
            if not isinstance(tensor, StoredTensor) or tensor.kind != Kind(shape, kind.dtype):
                raise CheckpointError(
                    f"{file} has at byte {start} something other than the {Kind(shape, kind.dtype)} that its metadata "
                    f"say. Copy the folder again."
                )
            block = archive.block(tensor)
            found.append(Block(block.file, block.start, offsets, shape, block.strides))
    return found


def _lightning_meta(place: str) -> Mapping[str, Any]:
    """What Lightning keeps beside its sharded checkpoints: counters and schedulers. Empty for others' folders."""
    path = join(place, _LIGHTNING_META)
    size = size_of(path)
    if size is None:
        return {}
    with Files() as files:
        content = open_archive(path, files, 0, size).content
    return content if isinstance(content, Mapping) else {}
