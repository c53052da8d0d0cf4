"""Options that a merge and a sweep share, checked. This module knows words and places; it reads no tensor."""

import os
from collections.abc import Sequence
from pathlib import Path

from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.offline import recognise
from pretrain_merge.offline.files import is_remote
from pretrain_merge.offline.tensors import Source


def new_folder(out: str | Path) -> Path:
    """Where a result goes, as an absolute path.

    Raises:
        ConfigError: It is a URL.
        CheckpointError: Something is there.
    """
    if is_remote(str(out)):
        raise ConfigError(f"out: {out} is a URL. Results are written to a local folder: name one, and copy it there.")
    # a link to nowhere, too, is something that is there
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists and is never overwritten. Move it away, or write to another folder.")
    # absolute now: a LightningModule that is built for a sweep may change the folder
    return Path(out).absolute()


def find(places: str | Path | Sequence[str | Path]) -> list[Source]:
    """Every checkpoint that was named.

    Raises:
        ConfigError: None was.
        CheckpointError: One cannot be read.
    """
    found = recognise.find([places] if isinstance(places, str | Path) else places)
    if not found:
        raise ConfigError("sources: no checkpoint was named. Name at least one file or folder.")
    return found


def find_base(place: str | Path | None) -> Source | None:
    """The one checkpoint that gives what others lack; None: none does."""
    return None if place is None else recognise.find_one(place)


def refuse_text(**options: Sequence[str]) -> None:
    """Raise a `ConfigError` where a list of patterns is one text: each of its letters would be a pattern."""
    for option, patterns in options.items():
        if isinstance(patterns, str):
            raise ConfigError(f"{option}: {patterns!r} is one text. Give a list of patterns: [{patterns!r}].")


def refuse_unknown(option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a `ConfigError` where a value is none of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{option}: {value!r} is not known. Allowed: {', '.join(map(repr, allowed))}.")


def checked_device(device: str) -> str:
    """Where sums are made.

    Raises:
        ConfigError: It is not a device, or not there.
    """
    if device == "cpu":
        return device  # which needs no torch
    import torch

    try:
        # torch's own parser: it knows every backend that is installed
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is not a device. Allowed: 'cpu', 'cuda', 'cuda:1'.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} is not there on this machine. Leave it at 'cpu'.")
    return device
