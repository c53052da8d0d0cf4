"""Where the numbers of a merged model come from, as the file that lies beside its weights.

This module knows which of its keys are needed to read the weights back; the others are for people.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic, untrusted

PROVENANCE = "provenance.json"
FORMAT = "pretrain-merge/1"
WITHDRAWN = "withdrawn"  # why a merge is not to be used after all
_SUM = "crc32"  # of all other values, whatever the file's spaces and order


def write_provenance(folder: Path, about: Mapping[str, Any]) -> None:
    """Write a provenance under its checksum.

    Raises:
        OSError: The disk refuses.
    """
    atomic.write(folder / PROVENANCE, provenance_text(about))


def provenance_text(about: Mapping[str, Any]) -> str:
    """What the file holds: the values and their checksum."""
    values = json.loads(json.dumps(about))  # as they will be read
    return json.dumps(values | {_SUM: _checksum(values)}, indent=2, sort_keys=True) + "\n"


def add_reasons(folder: Path, reasons: Sequence[str]) -> None:
    """Note in the provenance of a saved model that it is kept for other reasons, too; on one rank.

    Raises:
        CheckpointError: It is not a merged model, or cannot be written.
    """
    about = read_provenance(folder)
    known = about.get("saved_for", [])
    if isinstance(known, list) and not set(reasons) <= set(map(str, known)):
        about["saved_for"] = [*known, *(reason for reason in reasons if reason not in known)]
        _rewrite(folder, about)


def set_withdrawn(folder: Path, reason: str) -> None:
    """Note in the provenance of a saved model why it was taken back; empty: it was not. On one rank.

    One that was deleted or damaged by others is left: whoever loads it is told.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        about = read_provenance(folder)
    except CheckpointError:
        return
    if about.get(WITHDRAWN, "") != reason:
        about.pop(WITHDRAWN, None)  # no key where there is no reason, as if there had never been one
        _rewrite(folder, about | ({WITHDRAWN: reason} if reason else {}))


def _rewrite(folder: Path, about: Mapping[str, Any]) -> None:
    try:
        write_provenance(folder, about)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / PROVENANCE}: {error}. Free space there.") from error


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a merged model.

    Raises:
        CheckpointError: The folder is not a merged model.
    """
    try:
        found = untrusted.read_json(folder / PROVENANCE)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a merged model ({error}). Name a folder that holds model.safetensors and {PROVENANCE}, "
            f"as ModelMerging saves it under merged/."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / PROVENANCE} is not of format {FORMAT!r}. Read it with the version that wrote it."
        )
    found = without_checksum(found, folder / PROVENANCE)
    # those that a folder of an earlier version lacks are filled in
    provenance: dict[str, Any] = {"as_integers": {}, "files": {}} | found
    are_texts = all(_are_texts(provenance.get(key)) for key in ("ties", "as_integers"))
    if not are_texts or not isinstance(provenance.get("prefix"), str) or not _are_sums(provenance["files"]):
        raise CheckpointError(f"{folder / PROVENANCE} is damaged. Copy the folder again.")
    return provenance


def without_checksum(found: Mapping[str, Any], path: object) -> dict[str, Any]:
    """The values that were written, from those that a file holds.

    Raises:
        CheckpointError: They are others.
    """
    values = dict(found)
    written = values.pop(_SUM, None)  # a folder of an earlier version has none
    if written is not None and written != _checksum(values):
        raise CheckpointError(
            f"{path} is damaged: its values are not those that were saved. Copy the folder again, or, where it was "
            f"changed on purpose, take {_SUM!r} out of it."
        )
    return values


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _are_texts(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())


def _are_sums(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(pair, list) and [type(number) for number in pair] == [int, int] and Path(name).name == name
        for name, pair in files.items()
    )
