"""What a run's folder takes on the disk. This module knows names and sizes, and opens no file."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_MOST_ENTRIES = 200_000  # a folder of a data set by mistake; what lies beyond is not counted


@dataclass(frozen=True)
class Use:
    """One entry of a run's folder.

    Attributes:
        name: Of the entry; a folder's ends in a slash.
        link: Where it is, as a relative reference from the page.
        num_bytes: Of all files in it. A link counts as itself.
        num_files: How many these are.
    """

    name: str
    link: str
    num_bytes: int
    num_files: int


def disk_use(folder: Path, page: Path) -> list[Use]:
    """The entries of a folder, the largest first; a folder that cannot be read has none.

    Args:
        folder: Of a run.
        page: The file that the links start from.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    uses = [_use(entry, page) for entry in entries]
    return sorted(uses, key=lambda use: (-use.num_bytes, use.name))


def _use(entry: Path, page: Path) -> Use:
    sizes = list(_sizes(entry))
    is_folder = entry.is_dir() and not entry.is_symlink()
    # "./" first: a name such as javascript:… would else be a scheme
    link = "./" + quote(os.path.relpath(entry.absolute(), page.absolute().parent))
    return Use(f"{entry.name}/" if is_folder else entry.name, link, sum(sizes), len(sizes))


def _sizes(entry: Path) -> Iterator[int]:
    left = _MOST_ENTRIES
    waiting = [os.fspath(entry)]
    while waiting and left > 0:
        path = waiting.pop()
        # of entries, not of bytes: time is what a folder too many costs
        left -= 1
        try:
            if os.path.isdir(path) and not os.path.islink(path):  # a link may lead up again, without end
                waiting += (item.path for item in os.scandir(path))
            else:
                yield os.lstat(path).st_size
        except OSError:  # gone meanwhile: a live run deletes what it does not need
            continue


def bytes_text(number: float) -> str:
    """A number of bytes for a reader: decimal units, three digits.

    >>> bytes_text(231_000_000)
    '231 MB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
