"""DCP's `.metadata`, which is a pickle, read with an allow list.

The classes that `torch.distributed.checkpoint` writes become records with their attributes. This module knows what may
be in such a file. It knows no tensors.
"""

from collections.abc import Mapping
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.offline import plain_pickle, torch_objects
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.plain_pickle import Name, Record, inert
from pretrain_merge.offline.tensors import Dtype

_LONGEST_METADATA = 2**31  # bytes: 100,000 tensors on 1,000 ranks
_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    "metadata": "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
                "MetadataIndex StorageMeta",
    "filesystem": "_StorageInfo _StoragePrefix",
}  # fmt: skip
# what its fields hold: shapes, dtypes, and the path where it was saved
_VALUES = ("torch.Size", "collections.OrderedDict", "torch.serialization._get_layout")
_NAMES: Mapping[str, Any] = {
    **{f"{_DCP}.{m}.{name}": Name(name, Record) for m, names in _RECORDS.items() for name in names.split()},
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING": inert("_MEM_FORMAT_ENCODING"),
    **{
        path: found
        for path, found in torch_objects.NAMES.items()
        if path in _VALUES or path.rpartition(".")[0] in torch_objects.PATHS or isinstance(found, Dtype)
    },
}


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
        return plain_pickle.load(pickled, _NAMES)
    except plain_pickle.NotPlainError as error:
        raise CheckpointError(
            f"{path} is not plain metadata: {error} Use the checkpoint from where you trust it."
        ) from error
    except Exception as error:  # a crafted pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}). Copy the folder again.") from error
