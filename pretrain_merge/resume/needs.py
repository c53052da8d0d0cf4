"""Which checkpoint needs which files: a list on the disk to which each save adds a line, however many there were.

This module knows names and paths as text. The list is `checkpoints.json`, as it was when a run last started or ended,
and `checkpoints.journal`, with a line for each change since; together they are put into one file again from time to
time. It looks at no checkpoint and deletes no file of a snapshot.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pretrain_merge.files import atomic, untrusted

_LIST, _JOURNAL = "checkpoints.json", "checkpoints.journal"
_LEAST_LINES = 1000  # of a journal that is worth to be put into the list while the run goes on
# 3,000 checkpoints of a window of 1,000 snapshots
_MOST_BYTES, _MOST_VALUES = 2**25, 2**19  # 5,000 checkpoints of a window of 100; read within a second and 200 MB
Names = list[list[str]]  # of files: one list for each time that the checkpoint was written and may still be that one


class Needs:
    """The files that checkpoints need.

    Args:
        folder: Where the list is.

    Attributes:
        is_damaged: The list cannot be read, and nothing is known.

    Raises:
        OSError: The disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._needs: dict[str, Names] = {}
        self._users: Counter[str] = Counter()  # how many lists a file is in
        self._unneeded: set[str] = set()
        self._num_lines = 0
        try:
            found = read_needs(folder)
            self.is_damaged = False
        except ValueError:
            found, self.is_damaged = {}, True
        for checkpoint, names in found.items():
            self._set(checkpoint, names)
        if not self.is_damaged and os.path.lexists(folder / _JOURNAL):
            self.compact()

    def __contains__(self, checkpoint: str) -> bool:
        return checkpoint in self._needs

    def __getitem__(self, checkpoint: str) -> Names:
        return self._needs.get(checkpoint, [])

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """All that need something, the ones that were noted last at the end."""
        return tuple(self._needs)

    def is_needed(self, name: str) -> bool:
        """Whether some checkpoint needs a file."""
        return self._users[name] > 0

    def update(self, changes: Iterable[tuple[str, Names]], *, outlives_run: bool = False) -> None:
        """Note what checkpoints need from now on; an empty list: they are gone.

        Args:
            changes: Checkpoints and their files.
            outlives_run: Whether this must survive a loss of power, too.

        Raises:
            OSError: The disk refuses.
        """
        changes = list(changes)
        if not changes:
            return
        for checkpoint, names in changes:
            self._set(checkpoint, names)
        if self._num_lines > max(_LEAST_LINES, 2 * len(self._needs)):
            self.compact()
            return
        atomic.make_folder(self._folder)  # it went with the run before where nothing was in it
        text = "".join(json.dumps(change) + "\n" for change in changes)
        atomic.append(self._folder / _JOURNAL, text, outlives_run=outlives_run)
        self._num_lines += len(changes)

    def take_unneeded(self) -> set[str]:
        """Files that no checkpoint needs any more, of those that one has stopped to need since this was asked last."""
        found = {name for name in self._unneeded if not self.is_needed(name)}
        self._unneeded.clear()
        return found

    def compact(self) -> None:
        """Put everything into one file.

        Raises:
            OSError: The disk refuses.
        """
        path = self._folder / _LIST
        if self._needs:
            atomic.make_folder(self._folder)
            atomic.write(path, json.dumps(self._needs, indent=1, sort_keys=True))
        else:
            path.unlink(missing_ok=True)
        # last: read twice, it says the same
        (self._folder / _JOURNAL).unlink(missing_ok=True)
        self._num_lines = 0

    def _set(self, checkpoint: str, names: Names) -> None:
        before = self._needs.pop(checkpoint, [])
        names = [[sys.intern(name) for name in part] for part in names]  # one text for each file, in many lists
        if names:
            self._needs[checkpoint] = names
        self._users.update(name for part in names for name in part)
        for name in (name for part in before for name in part):
            self._users[name] -= 1
            if self._users[name] == 0:
                del self._users[name]
                self._unneeded.add(name)


def read_needs(folder: Path) -> dict[str, Names]:
    """What the list in a folder says, by checkpoint.

    Raises:
        ValueError: It is damaged.
    """
    needs: dict[str, Names] = {}
    try:
        if os.path.lexists(folder / _LIST):
            needs = untrusted.read_json(folder / _LIST, at_most=_MOST_BYTES, most_values=_MOST_VALUES, is_ours=True)
            if not isinstance(needs, dict) or not all(map(_are_names, needs.values())):
                raise ValueError("not a list of needs")
        for line in untrusted.lines(folder / _JOURNAL) if os.path.lexists(folder / _JOURNAL) else ():
            if not line.endswith(b"\n"):
                break  # the process was killed while it wrote this, before the checkpoint
            change = untrusted.parse_json(line)
            if not (isinstance(change, list) and len(change) == 2 and isinstance(change[0], str)):
                raise ValueError("not a change of needs")
            checkpoint, names = change
            if not _are_names(names):
                raise ValueError("not a change of needs")
            needs.pop(checkpoint, None)
            needs |= {checkpoint: names} if names else {}
    except OSError as error:
        raise ValueError(str(error)) from error
    return needs


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value
    )
