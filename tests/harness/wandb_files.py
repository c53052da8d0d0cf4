"""Files of offline W&B runs, read without the package: until when its own process writes them, and what they hold."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def finished_records(path: Path, patience: float = 30.0) -> list[Any]:
    """All records, once W&B's own process has written its last one (it goes on after `wandb.finish`)."""
    deadline = time.monotonic() + patience
    while True:
        records = list(_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} has no end after {patience} s"
        time.sleep(0.1)


def _records(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: LevelDB's log format (blocks of 32 KiB, records in parts) around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # too little for a header: padding
            position += left
            continue
        _, length, part = struct.unpack("<IHB", data[position : position + 7])
        body = data[position + 7 : position + 7 + length]
        if len(body) < length:  # still being written
            return
        record = body if part in (1, 2) else record + body  # whole or first
        if part in (1, 4):  # whole or last
            yield wandb_internal_pb2.Record.FromString(record)
        position += 7 + length
