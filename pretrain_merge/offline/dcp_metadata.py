"""DCP's `.metadata`, which is a pickle, read with an allow list.

The classes that `torch.distributed.checkpoint` writes become plain records of this module, and any other name is an
error before anything is called. This module knows what may be in such a file. It knows no tensors.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline.files import Files, size_of

_LONGEST_METADATA = 2**31  # bytes: 100,000 tensors on 1,000 ranks


def read_metadata(path: str) -> Any:
    """The record of the class `Metadata`, as far as the file has one.

    Raises:
        CheckpointError: It is missing, damaged, or more than plain data.
    """
    size = size_of(path)
    if size is None:
        raise CheckpointError(f"{path} is missing: that checkpoint was not finished. Use another one.")
    # it is read as a whole, and a crafted one may be as long as the disk
    if size > _LONGEST_METADATA:
        raise CheckpointError(f"{path} has {size} bytes, more than metadata ever need. Copy the folder again.")
    with Files() as files:
        pickled = files.read(path, 0, size)
    try:
        return _Unpickler(io.BytesIO(pickled)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not plain metadata: {error}") from error
    except Exception as error:  # a crafted pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}). Copy the folder again.") from error


class _Record:
    """Stands for a class of DCP's metadata: attributes and nothing else."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:  # TensorProperties: (dtype, layout, requires_grad, memory_format, pin_memory)
            self.__dict__["state"] = state

    def __hash__(self) -> int:
        return id(self)


def _ignored(*_: Any) -> None:
    """Stands for values that are not needed, such as the path where it was saved."""


_DCP = "torch.distributed.checkpoint"
_ALLOWED: Mapping[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): _Record,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _Record,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _Record,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Record,
    (f"{_DCP}.metadata", "TensorProperties"): _Record,
    (f"{_DCP}.metadata", "MetadataIndex"): _Record,
    (f"{_DCP}.metadata", "StorageMeta"): _Record,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _ignored,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Record,
    (f"{_DCP}.filesystem", "_StoragePrefix"): _Record,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _ignored,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _ignored,
    ("pathlib", "Path"): _ignored,
    ("pathlib._local", "PosixPath"): _ignored,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # dtypes are values; whatever else torch has by a name could be called
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise CheckpointError(
                f"it names {module}.{name}, which no metadata of torch.distributed.checkpoint needs. It is not run. "
                f"Use the checkpoint from where you trust it."
            ) from None

    def persistent_load(self, _: Any) -> Any:
        raise CheckpointError("it refers to objects outside it. Copy the folder again.")
