"""Whoever works with the folders of merged models beside the run: told of each, and asked before one is deleted."""

from pathlib import Path
from typing import Protocol


class FolderUsers(Protocol):
    """Who works with folders beside the run."""

    def published(self, folder: Path, view: str, step: int) -> None:
        """Hear of a model that is whole on disk."""

    def is_using(self, folder: Path) -> bool:
        """Whether it must stay for now; a rank that does not know says no."""


class NobodyUses:
    """No such user."""

    def published(self, folder: Path, view: str, step: int) -> None:
        """Nobody wants to know."""

    def is_using(self, folder: Path) -> bool:
        """No."""
        return False
