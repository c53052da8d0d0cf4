"""safetensors files, and folders of them: Hugging Face's, our own merged models, and shards that DCP wrote.

This module knows the header's format, and believes nothing of it that the file's size does not bear out.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files.untrusted import MOST_BYTES, parse_json
from pretrain_merge.offline import tensors
from pretrain_merge.offline.files import Files, join, size_of
from pretrain_merge.offline.tensors import Block, Dtype, Kind, Source

INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
_DCP_SHARDS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint notes which box of a tensor a file has
DTYPES = {
    short: tensors.DTYPES[name]
    for short, name in (
        ("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("I64", "int64"),
        ("I32", "int32"), ("I16", "int16"), ("I8", "int8"), ("U8", "uint8"), ("U16", "uint16"), ("U32", "uint32"),
        ("U64", "uint64"), ("BOOL", "bool"), ("C64", "complex64"), ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E5M2", "float8_e5m2"), ("F8_E8M0", "float8_e8m0fnu"),
    )
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_files(place: str, paths: Sequence[str], *, kind: str = "safetensors", **about: Any) -> Source:
    """One checkpoint in one or several files.

    Raises:
        CheckpointError: A file is not what its header says, or two hold the same tensor.
    """
    dtypes: dict[str, Dtype] = {}
    blocks: dict[str, list[Block]] = {}
    with Files() as files:
        for path in paths:
            for name, dtype, block in _entries(path, files):
                # shards of one tensor: a file of another checkpoint among them
                if dtypes.setdefault(name, dtype) != dtype:
                    raise CheckpointError(f"{place} has {name!r} in {dtypes[name]} and in {dtype}. Copy it again.")
                blocks.setdefault(name, []).append(block)
    kinds = {name: Kind(whole_shape(place, name, blocks[name]), dtype) for name, dtype in dtypes.items()}
    return Source(place, kind, kinds, blocks.__getitem__, tuple(paths), **about)


def whole_shape(place: str, name: str, blocks: Sequence[Block]) -> tuple[int, ...]:
    """The shape of the tensor that boxes make up.

    Raises:
        CheckpointError: One is missing, or two overlap.
    """
    ends = [tuple(map(sum, zip(block.offsets, block.shape, strict=True))) for block in blocks]
    shape = tuple(map(max, zip(*ends, strict=True)))
    # as many elements as the whole has, in boxes with corners of their own: no gap, and no overlap
    num_found = sum(math.prod(block.shape) for block in blocks)
    places = [block.offsets for block in blocks if math.prod(block.shape)]
    if len(set(places)) != len(places) or num_found != math.prod(shape):
        raise CheckpointError(
            f"{place} does not hold each element of {name!r} once: {len(blocks)} parts with {num_found} elements for "
            f"the shape {shape}. Remove what does not belong to it, or copy it again."
        )
    return shape


def indexed_files(folder: str, index: str) -> list[str]:
    """The files that an index names.

    Raises:
        CheckpointError: It is damaged, or names what lies elsewhere.
    """
    path = join(folder, index)
    try:
        named = read_json(path)["weight_map"]
        files = sorted(set(named.values()))
        # a path would read what its author chose on this machine
        if not files or not all(isinstance(file, str) and file and "/" not in file for file in files):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy the folder again.") from error
    return [join(folder, file) for file in files]


def read_json(path: str) -> Any:
    """A JSON file, local or remote.

    Raises:
        CheckpointError: It cannot be read.
        ValueError: It is not JSON.
    """
    size = size_of(path) or 0
    if size > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    with Files() as files:
        return parse_json(files.read(path, 0, size))


def header_of(entries: Mapping[str, tuple[Kind, int]]) -> bytes:
    """The header of a file: by name, a tensor and the byte after the header at which it begins; in that order."""
    plain: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (kind, start) in entries.items():
        offsets = [start, start + kind.num_bytes]
        plain[name] = {"dtype": NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
    text = json.dumps(plain, separators=(",", ":")).encode()
    # so that tensors begin at a multiple of 8 bytes, and can be mapped
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _entries(path: str, files: Files) -> list[tuple[str, Dtype, Block]]:
    size = size_of(path)
    if size is None:
        raise CheckpointError(f"{path} is missing. Copy it from where the checkpoint is whole.")
    try:
        (length,) = struct.unpack("<Q", files.read(path, 0, 8))
        # before memory is taken for it
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"it says that its header has {length} bytes, and the file has {size}")
        header = json.loads(files.read(path, 8, length), object_pairs_hook=_unique)
        shards = json.loads(header.pop("__metadata__", {}).get(_DCP_SHARDS, "{}"))
        begin = 8 + length
        found = [_entry(path, name, entry, shards.get(name), begin) for name, entry in header.items()]
        _refuse_gaps(found, begin, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). Copy it again from where it is whole."
        ) from error
    return [(name, dtype, block) for name, dtype, block, _ in found]


def _entry(path: str, name: str, entry: Any, shard: Any, begin: int) -> tuple[str, Dtype, Block, int]:
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"{name!r} is of dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{name!r} is of shape {shape} at {start} to {stop}")
    kind = Kind(shape, dtype)
    if stop - start != kind.num_bytes:
        raise ValueError(f"{name!r} is {kind}, which is {kind.num_bytes} bytes, and lies at {start} to {stop}")
    offsets = tuple(map(int, shard["saved_offsets"])) if shard else (0,) * len(shape)
    if len(offsets) != len(shape) or min(offsets, default=0) < 0:
        raise ValueError(f"{name!r} begins at {offsets}")
    return name, dtype, Block(path, begin + start, offsets, shape), begin + stop


def _refuse_gaps(found: list[tuple[str, Dtype, Block, int]], begin: int, size: int) -> None:
    spans = sorted((block.start, stop) for _, _, block, stop in found)
    for (_, stop), (start, _) in pairwise([(begin, begin), *spans, (size, size)]):
        # the reference implementation refuses gaps too: they can hide another file
        if start != stop:
            raise ValueError(f"its tensors do not fill it: one ends at byte {stop}, the next begins at {start}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found
