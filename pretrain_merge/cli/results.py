"""Where a subcommand's tables and its results for other programs go. It knows nothing of what is in them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain_merge.errors import CheckpointError, MissingDependencyError, printable
from pretrain_merge.files import atomic
from pretrain_merge.records.tables import require_rich

if TYPE_CHECKING:
    from rich.console import Console

_STANDARD_OUTPUT = Path("-")


def console_beside(result: Path | None = None) -> "Console":
    """Where to print for people: standard error where the result goes to standard output, so that pipes get it alone.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    require_rich()
    from rich.console import Console

    # with the result on standard output, all else goes beside it, so that a pipe gets nothing but JSON
    return Console(highlight=False, stderr=result == _STANDARD_OUTPUT)


def write_picture(
    console: "Console", draw: Callable[[Path], object], wanted: Path | None, default: Path, *, what: str
) -> None:
    """Draw where the user wants it, else to a place of its own; say where.

    Args:
        console: Told where it is, or why there is none.
        draw: Makes the figure, and saves it at a path.
        wanted: What the user named.
        default: Where it goes otherwise.
        what: Of the picture, for the line that says so.

    Raises:
        ConfigError: It was asked for, and no figure has the format.
        CheckpointError: It was asked for and cannot be written.
        MissingDependencyError: It was asked for, and matplotlib is not installed.
    """
    try:
        draw(wanted or default)
    except (MissingDependencyError, CheckpointError) as error:
        # a picture by default is a present, also where the run is somebody else's; one that was asked for is owed
        if wanted is not None:
            raise
        console.print(f"No picture: {printable(error)}", soft_wrap=True, markup=False)
        return
    console.print(f"{what}: {printable(wanted or default)}", soft_wrap=True, markup=False)


def write_result(path: Path, text: str) -> None:
    """Write the file that a user named; `-` is standard output.

    Raises:
        CheckpointError: It cannot be written, or is a link or something else than a file.
    """
    if path == _STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    try:
        atomic.write(path, text)
    except OSError as error:
        why = error.strerror or error  # the whole would name a temporary file
        raise CheckpointError(f"cannot write {path}: {why}. Name a file in a folder that can be written.") from error
