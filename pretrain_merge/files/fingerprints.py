"""What lies at the path of a checkpoint, in words that are others for another file: here, or on remote storage.

This module knows paths, URLs and fsspec. The paths it is asked about stand in a file of the run's folder, which others
may have written, and an URL can make requests, wait without end or run a command (P37). So remote storage is asked only
where the user's own Trainer writes, and no longer than a while.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

UNKNOWN = "unknown"  # so nothing that the checkpoint needs may go
PATIENCE = 20.0  # seconds; an answer takes less than one


class Fingerprints:
    """Answers for one run.

    Args:
        folder: What relative paths are relative to.
        places: Where the user's Trainer writes and reads; URLs of other schemes than theirs are not followed.
    """

    def __init__(self, folder: Path, places: Iterable[object] = ()) -> None:
        self._folder = folder
        self._schemes = {_scheme_of(str(place)) for place in places} - {None}
        self._silent: set[str] = set()

    def trust(self, place: object) -> None:
        """The user's Trainer writes there, too."""
        self._schemes |= {_scheme_of(str(place))} - {None}

    def of(self, path: str) -> str | None:
        """The file or folder at a path; None where there is none, `UNKNOWN` where that cannot be told."""
        if "://" in path:
            return self._of_remote(path)
        try:
            status = os.stat(os.path.normpath(self._folder / path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        # ValueError: a null byte in a path that a crafted list names
        except (OSError, ValueError):
            return UNKNOWN
        return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"

    def _of_remote(self, url: str) -> str | None:
        scheme = _scheme_of(url)
        if scheme is None or scheme not in self._schemes or scheme in self._silent:
            return UNKNOWN
        answers: list[str | None] = []
        thread = Thread(target=lambda: answers.append(_asked(url)), daemon=True)  # nothing else ends a silent server
        thread.start()
        thread.join(PATIENCE)
        # asked once: a server that is silent now would hold up every save
        if not answers:
            self._silent.add(scheme)
            return UNKNOWN
        return answers[0]


def _scheme_of(place: str) -> str | None:
    """That of a URL; None for a local path, and for a chain, whose later parts fsspec would open as well."""
    scheme, separator, _ = place.partition("://")
    return scheme if separator and "::" not in place else None


def _asked(url: str) -> str | None:
    import fsspec  # only where a checkpoint is remote

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return repr(filesystem.info(path))
    except FileNotFoundError:
        return None
    except Exception:
        return UNKNOWN
