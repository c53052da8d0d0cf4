"""What a subcommand writes beside what it prints. This module knows files; it knows nothing of what is in them."""

from pathlib import Path

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic


def write_result(path: Path, text: str) -> None:
    """Write the file that a user named.

    Raises:
        CheckpointError: It cannot be written, or is a link or something else than a file.
    """
    try:
        atomic.write(path, text)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}. Name a file in a folder that can be written.") from error
