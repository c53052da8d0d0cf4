"""Where each tensor of a snapshot lies in a safetensors file, and which part of which tensor to write next.

This module knows the format and computes offsets. It opens no file.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain_merge.files import untrusted

_ALIGNMENT = 64  # bytes; where the data begin, so that vector loads from a mapped file cross no cache line
_LISTED = 3  # differences that a message names
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Layout:
    """The plan of one file. Largest elements come first, so that all are aligned.

    Attributes:
        header: Everything before the first tensor's bytes.
        order: Names in the order of the file.
        places: By name, in the order of the live tensors: dtype, shape, first byte after the header, one past the last.
    """

    header: bytes
    order: tuple[str, ...]
    places: Mapping[str, tuple[torch.dtype, torch.Size, int, int]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> "Layout":
        """The plan for contiguous tensors, each written as its dtype."""
        chosen = dict(zip(tensors, dtypes, strict=True))
        order = sorted(tensors, key=lambda name: -chosen[name].itemsize)
        places, start = {}, 0
        for name in order:
            stop = start + tensors[name].numel() * chosen[name].itemsize
            places[name] = (chosen[name], tensors[name].shape, start, stop)
            start = stop
        entries = {
            name: {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            for name, (dtype, shape, begin, end) in places.items()
        }
        text = json.dumps(entries).encode()
        # safetensors allows spaces after its JSON; 8 bytes that say its length stand before
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return cls(struct.pack("<Q", len(text)) + text, tuple(order), {name: places[name] for name in tensors})

    def chunks(
        self, tensors: Mapping[str, Sequence[Tensor]], num_bytes: int
    ) -> Iterator[list[tuple[Tensor, torch.dtype]]]:
        """The flat parts of tensors in the order of the file, cut to fill up to `num_bytes`, at least one element's."""
        chunk: list[tuple[Tensor, torch.dtype]] = []
        room = num_bytes
        # in the order of the file, so that its writer never seeks
        flat = ((self.places[name][0], part.view(-1)) for name in self.order for part in tensors[name])
        for dtype, part in flat:
            start = 0
            while start < part.numel():
                stop = min(part.numel(), start + room // dtype.itemsize)
                if stop > start:
                    chunk.append((part[start:stop], dtype))
                    room -= (stop - start) * dtype.itemsize
                if stop < part.numel():
                    yield chunk
                    chunk, room = [], num_bytes
                start = stop
        yield chunk

    def tensors_over(self, pages: Tensor) -> list[Tensor]:
        """Tensors over all bytes of the file, in the order of the live tensors."""
        data = pages[len(self.header) :]
        return [data[start:stop].view(dtype).view(shape) for dtype, shape, start, stop in self.places.values()]

    def differences(self, found: bytes) -> str:
        """What a file that begins with these bytes has otherwise: names, dtypes and shapes, the first few of them."""
        try:
            (length,) = struct.unpack_from("<Q", found)
            entries = untrusted.parse_json(found[8 : 8 + length])
            other = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        # a file of this name may be anything, and a crafted header any JSON
        except (struct.error, ValueError, TypeError, KeyError, AttributeError):
            return "it has no header of safetensors"
        here = {name: (_DTYPE_NAMES[dtype], tuple(shape)) for name, (dtype, shape, _, _) in self.places.items()}
        problems = [f"{name} is missing" for name in here.keys() - other.keys()]
        problems += [f"{name} is not in the model" for name in other.keys() - here.keys()]
        problems += [
            f"{name} is {other[name]} there and {here[name]} here"
            for name in here.keys() & other.keys()
            if other[name] != here[name]
        ]
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        return "; ".join(sorted(problems)[:_LISTED]) + more if problems else "its tensors lie in another order"
