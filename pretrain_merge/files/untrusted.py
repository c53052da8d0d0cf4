"""Files that anybody may have written: read without waiting, within bounds, and into plain values.

This module knows sizes and JSON; it knows nothing of what a file is for. Whatever a file holds, its functions raise
`OSError` or `ValueError`, to which the caller adds what its user can do. A checkpoint, a calibration or a run that was
downloaded must not keep a process waiting, fill its memory or break it in a way of its own.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 32 * 2**20  # the index of the largest public model has 14 MB
MOST_VALUES = 1_000_000  # a JSON of brackets takes up to 40 times its bytes in memory
LONGEST_LINE = 2**24  # a record of ten views over the largest window has 3 MB


@contextmanager
def opened(path: Path, *, is_ours: bool = False) -> Iterator[BinaryIO]:
    """A regular file, to be read.

    Args:
        path: Where it is.
        is_ours: Whether this package wrote it under this very name, so that it is not a link.

    Raises:
        OSError: It cannot be opened, or is something else: reading a pipe or a terminal waits for whoever writes.
    """
    # O_NONBLOCK: opening a pipe waits, too
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if is_ours else 0))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a file")
        yield file


def refuse_other_than_files(path: Path) -> None:
    """Raise an `OSError` where another library would open something that is not a regular file."""
    with opened(path):
        pass


def read_bytes(path: Path, *, at_most: int = MOST_BYTES, is_ours: bool = False) -> bytes:
    """All of a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than anything that it could be.
    """
    with opened(path, is_ours=is_ours) as file:
        # one byte more than allowed tells a file that is too large without reading it
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise ValueError(f"it has more than {at_most:,} bytes")
    return content


def read_json(path: Path, *, at_most: int = MOST_BYTES, most_values: int = MOST_VALUES, is_ours: bool = False) -> Any:
    """The value that a file of JSON holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON, or more than anything that it could be.
    """
    return parse_json(read_bytes(path, at_most=at_most, is_ours=is_ours), most_values=most_values)


def parse_json(text: bytes, *, most_values: int = MOST_VALUES) -> Any:
    """The value of JSON in UTF-8.

    Raises:
        ValueError: It is not JSON, or holds more values than anything that it could be, or is nested without end.
    """
    try:
        return json.loads(of_few_values(text, most_values=most_values).decode("utf-8"))
    # of the parser; a stranger's file must not look like a fault of ours
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def of_few_values(text: bytes, *, most_values: int = MOST_VALUES) -> bytes:
    """The same text of JSON, before it is parsed, which would take the memory.

    Raises:
        ValueError: It may hold more values than anything that it could be.
    """
    # a comma in a text counts too, which is on the safe side
    if sum(map(text.count, (b"[", b"{", b","))) > most_values:
        raise ValueError(f"it has more than {most_values:,} values")
    return text


def lines(path: Path, *, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a file, each with its end.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is longer than anything that it could be.
    """
    with opened(path) as file:
        while line := file.readline(longest + 1):
            if len(line) > longest:
                raise ValueError(f"a line has more than {longest:,} bytes")
            yield line
