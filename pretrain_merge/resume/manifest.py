"""What a checkpoint says of the window: plain values under a checksum, read back strictly.

This module knows the shape of those values. It reads no files and holds no tensors.
"""

import json
import types
import zlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pretrain_merge.cadence import Progress
from pretrain_merge.errors import CheckpointError, ProgressError
from pretrain_merge.files.snapshot_file import SnapshotFile, is_ours
from pretrain_merge.window.window import Break

_FORMAT = 2
_T = TypeVar("_T")


@dataclass(frozen=True)
class SavedSnapshot:
    """A snapshot of the window and the file that holds it."""

    segment: int
    progress: Progress
    lr: tuple[float, ...]
    phase: str
    file: SnapshotFile


@dataclass(frozen=True)
class SavedBlock:
    """The running sum of `average: block`; the file holds it, None where nothing was sampled yet."""

    num_seen: int
    num_samples: int
    is_valid: bool
    file: SnapshotFile | None


@dataclass(frozen=True)
class Manifest:
    """Everything a window needs to go on exactly.

    Attributes:
        settings: Keys of the configuration that decide what a snapshot is; a run with others cannot go on with it.
        progress: Counters of the last observed step.
        lr: Learning rates of that step.
        segment_lr: Learning rates that the current segment began with.
        phase: Name given to the last `mark_phase`, or empty.
        num_refused: Non-finite snapshots refused so far.
        segment: Number of breaks so far.
        last_break: The last of them.
        snapshot_is_new: Whether the last observed step took one.
        parameters: Names of the tensors that every snapshot holds: what the run merges, whatever is frozen meanwhile.
        snapshots: Oldest first.
        block: Of `average: block`.
        num_spikes: Spikes of the training loss so far.
        spikes: State of what looks for them; empty where nothing does.
    """

    settings: Mapping[str, Any]
    progress: Progress
    lr: tuple[float, ...]
    segment_lr: tuple[float, ...]
    phase: str
    num_refused: int
    segment: int
    last_break: Break | None
    snapshot_is_new: bool
    parameters: tuple[str, ...]
    snapshots: tuple[SavedSnapshot, ...]
    block: SavedBlock | None
    num_spikes: int = 0
    spikes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[SnapshotFile, ...]:
        """Every file that it refers to."""
        block = (self.block.file,) if self.block is not None and self.block.file is not None else ()
        return (*(saved.file for saved in self.snapshots), *block)

    def to_plain(self) -> dict[str, Any]:
        """Numbers, text, lists and dictionaries, with a checksum over all of them (P12)."""
        return sealed(asdict(self))

    @classmethod
    def from_plain(cls, plain: object) -> "Manifest":
        """The inverse of `to_plain`.

        Raises:
            CheckpointError: It is not in every value what `to_plain` gave.
        """
        return unsealed(cls, plain, check=_refuse_impossible)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as lists and dictionaries, under a checksum."""
    plain = _plain(values)
    return {"format": _FORMAT, "crc32": _checksum(plain), "values": plain}


def unsealed(kind: type[_T], plain: object, *, check: Callable[[_T], None] = lambda _: None) -> _T:
    """The dataclass whose values were sealed.

    Args:
        kind: The dataclass.
        plain: What `sealed` gave, as a checkpoint returned it.
        check: Raises ValueError for values that cannot be together.

    Raises:
        CheckpointError: It is not in every value what was sealed.
    """
    try:
        if not isinstance(plain, Mapping) or plain.get("format") != _FORMAT or "values" not in plain:
            raise ValueError(f"{_shortened(plain)} is not of format {_FORMAT}")
        # before the values are read: a flipped bit is damage, whatever it still parses as
        if plain.get("crc32") != _checksum(plain["values"]):
            raise ValueError("its checksum is another")
        values: _T = _parsed(kind, plain["values"], kind.__name__)
        check(values)
    # RecursionError: somebody may have nested values without end
    except (ValueError, TypeError, RecursionError, ProgressError) as error:
        raise CheckpointError(
            f"what the checkpoint says of the window is damaged ({error}). Resume from another checkpoint."
        ) from error
    return values


def _refuse_impossible(manifest: Manifest) -> None:
    steps = [saved.progress.step for saved in manifest.snapshots]
    segments = [saved.segment for saved in manifest.snapshots]
    if steps != sorted(set(steps)) or any(step > manifest.progress.step for step in steps):
        raise ValueError(f"its snapshots are of steps {steps}, and the run was at {manifest.progress.step}")
    if segments != sorted(segments) or any(not 0 <= segment <= manifest.segment for segment in segments):
        raise ValueError(f"its snapshots are of segments {segments}, and there were {manifest.segment} breaks")
    for file in manifest.files:
        # names are joined to a folder, and one with `..` in it would lead out
        if not is_ours(file.name):
            raise ValueError(f"{file.name!r} is not a name of a snapshot file")


def _checksum(values: object) -> int:
    # canonical: the same whether sequences were read back as lists or as tuples
    return zlib.crc32(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        # what JSON would make of it, so that the checksum is the same before and after
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _parsed(kind: Any, value: Any, at: str) -> Any:
    """A value of the type that a dataclass's annotation names."""
    if get_origin(kind) in (Union, types.UnionType):
        wanted = next(option for option in get_args(kind) if option is not types.NoneType)
        return None if value is None else _parsed(wanted, value, at)
    if is_dataclass(kind):
        if not isinstance(value, Mapping) or not _required(kind) <= value.keys() <= {
            item.name for item in fields(kind)
        }:
            raise ValueError(f"{at}: {_shortened(value)}")
        hints = get_type_hints(kind)
        return kind(**{key: _parsed(hints[key], item, f"{at}.{key}") for key, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_parsed(get_args(kind)[0], item, f"{at}[{index}]") for index, item in enumerate(value))
    if get_origin(kind) is not None:  # a mapping from text
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{at}: {_shortened(value)}")
        return {key: _parsed(get_args(kind)[1], item, f"{at}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    # True is an int, and no count
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{at}: {_shortened(value)}")
    return value


def _required(kind: Any) -> set[str]:
    """Names of values that were there from the first format on; those that came later have a default."""
    return {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
