"""Whole weights on disk as plain safetensors, also of parameters that are sharded over ranks, and their bits compared.

This module knows torch.distributed.checkpoint and safetensors. Shards pass through its safetensors storage, so no rank
ever gathers a parameter on its device; each file of whole tensors is then put together by one rank in host memory.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.merged_models.state import local
from pretrain_merge.parameters.bits import same_bits
from pretrain_merge.runtime import ranks

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_FILE = 5 * 10**9  # bytes; Hugging Face's own limit for long
_PARTS = "parts"
_BLOCK = 2**24  # bytes read at once


def write(folder: Path, tensors: Mapping[str, Tensor], *, largest_file: int) -> list[str]:
    """Write whole tensors: one file, or several and an index. Collective where a tensor is a DTensor.

    Args:
        folder: An empty folder that all ranks see.
        tensors: By name; DTensors in shards, others whole on every rank, of which those of rank 0 are written.
        largest_file: Bytes after which another file begins.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        OSError: The disk refuses.
    """
    own = []
    shards = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    # what every rank has whole may differ (statistics of BatchNorm), so it is in the first files, which rank 0 writes
    files = _files(dict(sorted(tensors.items(), key=lambda item: item[0] in shards)), largest_file)
    with _plain_errors():
        if shards:
            save(dict(shards), storage_writer=HuggingFaceStorageWriter(str(folder / _PARTS), save_distributed=True))
        for number, (file, names) in enumerate(files.items()):
            # by turns, so that ranks share the reading of parts and the writing of files
            writer = number % ranks.num_ranks() if shards.keys() >= set(names) else 0
            if writer == ranks.rank():
                save_file(_whole(folder, {name: tensors[name] for name in names}), folder / file, {"format": "pt"})
                own.append(file)
    if len(files) > 1 and ranks.rank() == 0:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(map(_num_bytes, tensors.values()))}, "weight_map": weight_map}
        atomic.write(folder / INDEX, json.dumps(index, indent=2) + "\n")
        own.append(INDEX)
    return own


def remove_parts(folder: Path) -> None:
    """Delete what the whole tensors were made from; on one rank, when all are done."""
    atomic.delete(folder / _PARTS)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Bytes and CRC-32 of files, by name.

    Raises:
        OSError: One cannot be read.
    """
    sums = {}
    for name in names:
        num_bytes = checksum = 0
        with untrusted.opened(folder / name) as file:
            while block := file.read(_BLOCK):
                num_bytes, checksum = num_bytes + len(block), zlib.crc32(block, checksum)
        sums[name] = [num_bytes, checksum]
    return sums


class Weights:
    """The tensors of a folder, whether one file or several hold them."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files  # by name of a tensor, open

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype as safetensors spells it."""
        tensor = self._files[name].get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """The part that this rank holds of it, where it is a DTensor; else all of it."""
        if not isinstance(tensor, DTensor) or tensor.dim() == 0:
            return self.whole(name)
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if 0 in sizes:
            return torch.empty(sizes, dtype=tensor.dtype)
        own: Tensor = self._files[name].get_slice(name)[
            tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        ]
        return own


@contextmanager
def opened(folder: Path) -> Iterator[Weights]:
    """The tensors of a folder, to be read one at a time.

    Raises:
        CheckpointError: The index is damaged.
        OSError: A file is missing, or none of safetensors.
    """
    with ExitStack() as stack, _plain_errors():
        if not (folder / INDEX).exists():
            file = stack.enter_context(_open(folder / WEIGHTS))
            yield Weights(dict.fromkeys(file.keys(), file))
            return
        named = _weight_map(folder / INDEX)
        open_files = {file: stack.enter_context(_open(folder / file)) for file in dict.fromkeys(named.values())}
        if any(set(file.keys()) != {name for name in named if named[name] == key} for key, file in open_files.items()):
            raise CheckpointError(f"{folder / INDEX} does not fit the files beside it. Copy the folder again.")
        yield Weights({name: open_files[file] for name, file in named.items()})


def hold(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder holds exactly these tensors, bit for bit, as far as this rank has written them."""
    try:
        with opened(folder) as weights:
            return weights.names() == tensors.keys() and all(
                weights.kind(name)[0] == tensor.shape and same_bits(weights.like(name, tensor), local(tensor))
                for name, tensor in tensors.items()
                if isinstance(tensor, DTensor) or ranks.rank() == 0
            )
    # what is not there, or damaged, does not hold them
    except OSError:
        return False


def _whole(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, DTensor) else tensor.contiguous()
        for name, tensor in tensors.items()
    }
    of_parts = {name: whole[name] for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if of_parts:
        # no_dist: no other rank reads for this file
        load(of_parts, storage_reader=HuggingFaceStorageReader(str(folder / _PARTS)), no_dist=True)
    storages: set[int] = set()
    for name, tensor in whole.items():  # safetensors refuses tensors that overlap, which a buffer and its slice do
        place = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    return whole


def _open(path: Path) -> Any:
    untrusted.refuse_other_than_files(path)  # safetensors would wait for a pipe
    return safe_open(path, framework="pt")


def _files(tensors: Mapping[str, Tensor], largest: int) -> dict[str, list[str]]:
    """Names of tensors by file, in their order; a file is never empty, so a larger tensor has one of its own."""
    groups: list[list[str]] = [[]]
    room = largest
    for name, tensor in tensors.items():
        if groups[-1] and _num_bytes(tensor) > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= _num_bytes(tensor)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weight_map(path: Path) -> dict[str, str]:
    try:
        named = untrusted.read_json(path)["weight_map"]
        # a path in it would be opened wherever it leads
        if not all(Path(file).name == file for file in named.values()):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy the folder again.") from error
    return dict(named)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What safetensors and torch raise, also where the disk is full, as the OSError that it is."""
    try:
        yield
    except CheckpointException as error:
        raise OSError("; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())) from error
    except SafetensorError as error:
        raise OSError(str(error)) from error
