"""Records in `merges.jsonl`: one line of JSON for each, in the order of their steps.

This module knows a file of lines; what a line holds is the record's business. A long run has 100,000 lines, so they are
read one after another and never held together, unless a caller asks for a list.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.records.late import Late
from pretrain_merge.records.record import MergeRecord

_BLOCK = 2**20


def append_record(path: Path, record: MergeRecord) -> None:
    """Add one line to a `merges.jsonl`, creating the folder where needed.

    Raises:
        CheckpointError: The file cannot be written.
    """
    _append(path, record)


def append_late(path: Path, late: Late) -> None:
    """Add the numbers that came after a merge point, in a line of their own: lines that are there never change.

    Raises:
        CheckpointError: The file cannot be written.
    """
    _append(path, late)


def _append(path: Path, line: MergeRecord | Late) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # one write of a whole line: who reads a live run's file sees no half of it
        atomic.append(path, line.to_json() + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot append the merge at step {line.step} to {path}: {error}. Free or unlock the run's folder, or "
            f"choose another with Trainer(default_root_dir=…)."
        ) from error


def read_records(path: Path) -> list[MergeRecord]:
    """Read a `merges.jsonl`, in the order of its lines; numbers that came later are in the records that they are of.

    Raises:
        CheckpointError: The file is missing, or a line is not a record of ours.
    """
    try:
        parsed = [_parsed(path, number, line) for number, line in enumerate(untrusted.lines(path), start=1)]
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {error}. Name the merges.jsonl of a run.") from error
    records = [item for item in parsed if isinstance(item, MergeRecord)]
    # by the last of a step: a run that was resumed may have measured it twice
    places = {record.step: place for place, record in enumerate(records)}
    for late in parsed:
        if isinstance(late, Late) and late.step in places:
            records[places[late.step]] = late.added_to(records[places[late.step]])
    return records


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
    newest = stop = 0
    kept: list[tuple[int, int]] = []  # from which byte to which: one part, unless two runs shared the file
    try:
        atomic.remove_leftovers(path.parent, f"{path.name}.*")  # of a run that was killed
        if not source.exists():
            return newest
        for number, line in enumerate(untrusted.lines(source), start=1):
            start, stop = stop, stop + len(line)
            # the last line of a run that was killed while it wrote; its merge is made again
            if not line.endswith(b"\n"):
                continue
            record = _parsed(source, number, line)
            if record.step <= step:
                if isinstance(record, MergeRecord):
                    newest = record.step
                    read(record)
                # as ranges of bytes, not as records: one record at a time is in memory, however long the run
                first = kept.pop()[0] if kept and kept[-1][1] == start else start
                kept.append((first, stop))
        # where nothing is cut the file stays as it is: long runs resume often
        if source != path or kept != [(0, stop)]:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic.draft(path) as draft:
                draft.file.writelines(_parts(source, kept))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot cut {source} at step {step}: {error}. Move it away, or unlock it.") from error
    return newest


def _parsed(path: Path, number: int, line: bytes) -> MergeRecord | Late:
    try:
        return Late.from_json(line) or MergeRecord.from_json(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}, line {number} is not a merge record ({error}). Every line is one JSON object as ModelMerging "
            f"writes it; remove the line, or name the merges.jsonl of a run."
        ) from error


def _parts(path: Path, parts: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of a file from one place to another, and so on, in blocks."""
    with untrusted.opened(path) as file:
        for start, stop in parts:
            file.seek(start)
            yield from (file.read(min(_BLOCK, stop - at)) for at in range(start, stop, _BLOCK))
