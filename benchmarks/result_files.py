"""Files of results that are committed. This module knows how they are written, and nothing of what is in them."""

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, so that what was interrupted leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def as_object(members: Iterable[str]) -> str:
    """A JSON object with each member on a line of its own: small, and a diff can be read."""
    return "{\n" + ",\n".join(members) + "\n}\n"
