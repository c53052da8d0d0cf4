"""What an offline W&B run wrote: its metrics row by row, and its configuration.

This module knows the `.wandb` file: LevelDB's log of protocol buffers. It knows no metric of ours.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pretrain_merge.errors import CheckpointError, MissingDependencyError
from pretrain_merge.files import untrusted

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")  # LevelDB's log: checksum, length, which part of a record
_WHOLE, _FIRST, _LAST = 1, 2, 4  # 3: in the middle
_SIGNATURE = 7  # bytes
_LARGEST_RECORD = 2**24  # bytes; one of ours has some kilobytes
Kind = Literal["history", "config"]


def items(path: Path) -> Iterator[tuple[Kind, Mapping[str, str]]]:
    """Rows of metrics, and changes of the configuration, as they were written: JSON by name.

    Raises:
        CheckpointError: It is not such a file.
        MissingDependencyError: wandb is not installed.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise MissingDependencyError("W&B runs are read with wandb. Run: pip install wandb") from error
    messages: Any = wandb_internal_pb2  # its classes are made when it is imported
    try:
        with untrusted.opened(path) as file:
            for content in _leveldb_records(file):
                record = messages.Record.FromString(content)
                kind = record.WhichOneof("record_type")
                if kind in ("history", "config"):
                    written = record.history.item if kind == "history" else record.config.update
                    yield kind, {item.key or "/".join(item.nested_key): item.value_json for item in written}
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error).__module__ != "google.protobuf.message":
            raise
        raise CheckpointError(f"cannot read {path}: {error}. Name the .wandb file of an offline run.") from error


def _leveldb_records(file: BinaryIO) -> Iterator[bytes]:
    position, record = _SIGNATURE, bytearray()  # W&B's own header comes first
    file.seek(position)
    while True:
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _HEADER.size:  # padding
            position += left_in_block
            file.seek(position)
            continue
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return
        _, length, part = _HEADER.unpack(head)
        body = file.read(length)
        if len(body) < length:  # a run that was killed, or still writes
            return
        if not _WHOLE <= part <= _LAST:  # the room of a file that was never written
            return
        if part in (_WHOLE, _FIRST):
            record.clear()
        if len(record) + length > _LARGEST_RECORD:
            raise ValueError(f"a record has more than {_LARGEST_RECORD:,} bytes")
        record += body
        if part in (_WHOLE, _LAST):
            yield bytes(record)
        position += _HEADER.size + length
