"""What a checkpoint on disk holds, in one form for every format: named tensors, and where their bytes lie.

This module knows shapes, dtypes and byte positions. It opens no file. A format's reader makes a `Source`; everything
after it (comparing, reading in pieces, merging) sees only this.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Dtype:
    """What an element is.

    Of our own, since a merge of safetensors files needs nothing else of torch, which takes longer to load than eight
    checkpoints of 440 MB to merge.

    Attributes:
        name: As torch has it.
        itemsize: Bytes of an element.
    """

    name: str
    itemsize: int

    def __str__(self) -> str:
        return self.name


_NAMES = {
    1: "bool int8 uint8 int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7 qint8 quint8 "
       "quint4x2 quint2x4 bits8 bits1x8 bits2x4 bits4x2 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
       "float8_e8m0fnu float4_e2m1fn_x2",
    2: "int16 uint16 float16 bfloat16 bits16",
    4: "int32 uint32 float32 complex32 qint32",
    8: "int64 uint64 float64 complex64",
    16: "complex128",
}  # fmt: skip
DTYPES: Mapping[str, Dtype] = {
    name: Dtype(name, itemsize) for itemsize, names in _NAMES.items() for name in names.split()
}
FLOAT16, FLOAT64 = DTYPES["float16"], DTYPES["float64"]
MERGED_DTYPES = (DTYPES["float32"], DTYPES["bfloat16"], FLOAT16, FLOAT64)


@dataclass(frozen=True)
class Kind:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def num_elements(self) -> int:
        """1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of its elements, without gaps."""
        return self.num_elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Block:
    """A box of a tensor that lies in one file, its elements one behind the other.

    Attributes:
        file: Path or URL.
        start: Its first byte there.
        offsets: Where the box begins in the tensor.
        shape: Of the box.
        strides: In elements, where it does not lie in row-major order; None: it does.
    """

    file: str
    start: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        place: What the user named.
        format: In a word, for provenance.
        tensors: What can be merged or copied, by name.
        locate: The blocks that make up a tensor. Called when its bytes are needed: some formats look inside a file.
        files: Every file with tensors in it.
        ties: Other names of a tensor in `tensors`.
        step: At which it was saved, as its content says; None: it does not say.
        lr: Learning rates of the step to come, per parameter group; empty: it does not say.
        optimizer: Tensors of optimizer states, by a name that says where each belongs.
        companions: Files beside the weights that belong to the model (`config.json`, a tokenizer).
        about: What else its own provenance says.
    """

    place: str
    format: str
    tensors: Mapping[str, Kind]
    locate: Callable[[str], Sequence[Block]]
    files: tuple[str, ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    lr: tuple[float, ...] = ()
    optimizer: Mapping[str, Kind] = field(default_factory=dict)
    companions: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def kind(self, name: str) -> Kind:
        """Of a tensor of the model or of an optimizer, by any of its names."""
        return self.tensors.get(self.ties.get(name, name)) or self.optimizer[name]
