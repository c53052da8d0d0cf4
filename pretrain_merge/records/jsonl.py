"""Records in `merges.jsonl`: one line of JSON for each, in the order of their steps.

This module knows a file of lines; what a line holds is the record's business. A long run has 100,000 lines, so they are
read one after another and never held together, unless a caller asks for a list.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pretrain_merge.errors import CheckpointError
from pretrain_merge.records.record import MergeRecord

_LONGEST_LINE = 2**26  # a view of 10,000 snapshots takes some 300 kB
_BLOCK = 2**20


def append_record(path: Path, record: MergeRecord) -> None:
    """Add one line to a `merges.jsonl`, creating the folder where needed.

    Raises:
        CheckpointError: The file cannot be written, or is a link, which could lead anywhere.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", opener=_opened_itself) as file:
            file.write(record.to_json() + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot append the merge at step {record.step} to {path}: {error}. Free or unlock the run's folder, or "
            f"choose another with Trainer(default_root_dir=…)."
        ) from error


def read_records(path: Path) -> list[MergeRecord]:
    """Read a `merges.jsonl`, in the order of its lines.

    Raises:
        CheckpointError: The file is missing, or a line is not a record of ours.
    """
    try:
        with path.open("rb") as file:
            return [_parsed(path, number, line) for number, line in _lines(path, file)]
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {error}. Name the merges.jsonl of a run.") from error


def keep_records_until(
    path: Path,
    step: int,
    *,
    before: Path | None = None,
    read: Callable[[MergeRecord], object] = lambda record: None,
) -> int:
    """Cut off the lines after a step, so that a resumed run writes no step twice; a half-written last line goes too.

    Args:
        path: A `merges.jsonl`. It changes at once or not at all.
        step: The last step that is kept.
        before: Where `path` does not exist: that of the run before, which a resumed run in a new folder begins with.
        read: Called with each record that is kept, in the order of the lines.

    Returns:
        Step of the last record that is kept; 0 where there is none.

    Raises:
        CheckpointError: The file cannot be read or rewritten.
    """
    source = before if before is not None and not path.exists() else path
    temporary = path.with_name(f".{path.name}.tmp")
    newest = 0
    try:
        temporary.unlink(missing_ok=True)  # of a run that was killed
        if not source.exists():
            return newest
        with source.open("rb") as file:
            kept: list[tuple[int, int]] = []  # from which byte to which: one part, unless two runs shared the file
            stop = 0
            for number, line in _lines(source, file):
                start, stop = stop, stop + len(line)
                if not line.endswith(b"\n"):
                    continue
                record = _parsed(source, number, line)
                if record.step <= step:
                    newest = record.step
                    read(record)
                    first = kept.pop()[0] if kept and kept[-1][1] == start else start
                    kept.append((first, stop))
            if source != path or kept != [(0, stop)]:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_parts(file, kept, temporary)
                temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot cut {source} at step {step}: {error}. Move it away, or unlock it.") from error
    return newest


def _opened_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
        if len(line) == _LONGEST_LINE:
            raise _not_a_record(path, number, f"it has more than {_LONGEST_LINE} bytes")
        yield number, line


def _parsed(path: Path, number: int, line: bytes) -> MergeRecord:
    try:
        return MergeRecord.from_json(line.decode("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _not_a_record(path, number, error) from error


def _not_a_record(path: Path, number: int, why: object) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {number} is not a merge record ({why}). Every line is one JSON object as ModelMerging writes "
        f"it; remove the line, or name the merges.jsonl of a run."
    )


def _write_parts(source: BinaryIO, parts: Iterable[tuple[int, int]], target: Path) -> None:
    with target.open("xb") as file:  # never through a link to something that lives
        for start, stop in parts:
            source.seek(start)
            for size in (min(_BLOCK, stop - at) for at in range(start, stop, _BLOCK)):
                file.write(source.read(size))
        file.flush()
        os.fsync(file.fileno())  # before it takes the place of the one that is whole
