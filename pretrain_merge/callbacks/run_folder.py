"""The folder of one run: where it is, whose files are in it, and one lock for all of them.

Run files go where Lightning's own checkpoints go, so that two runs whose loggers share a folder do not mix (P35). Each
run has an identity, which its checkpoints know: a run that goes on finds its own files again where another one has
begun in the same folder since. This module knows names and renames; rank 0 alone uses `RunFolder`.
"""

import errno
import json
import os
import re
import secrets
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pretrain_merge.config import MergeConfig
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.files import atomic, folder_lock
from pretrain_merge.runtime.log import WarnOnce

_RECORDS, _MERGED, _IDENTITY, _LOCK = "merges.jsonl", "merged", "merges.run.json", "merges.lock"
_CONFIG = "merges.config.yaml"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/.*", re.DOTALL)  # Lightning normalises file:///x to file:/x
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system that has none keeps no run from training
_ELSEWHERE = "Give this run one of its own: Trainer(default_root_dir=…), or a logger with another name or version."


def run_folder(config: MergeConfig, trainer: Any) -> Path:
    """Where records, merged models and the window go, for good: a change of the working directory moves nothing.

    Collective.
    """
    folder = logs_folder(trainer)
    return folder if config.name == MergeConfig.name else folder / config.name


def logs_folder(trainer: Any) -> Path:
    """Where Lightning puts what belongs to a run. Collective, since some loggers know their version on rank 0 only."""
    return atomic.named_by_user(trainer.strategy.broadcast(_lightnings(trainer)))


def refuse_remote_folder(trainer: Any) -> None:
    """Refuse a folder that is not a local path: locks, renames and memory maps need one.

    Raises:
        ConfigError: It is a URL.
    """
    folder = _lightnings(trainer)
    if _URL.fullmatch(folder) and not trainer.fast_dev_run:  # which writes nothing
        raise ConfigError(
            f"the run's folder is {folder}, and records, merged models and the window need a local one. Set "
            f"Trainer(default_root_dir=<local folder>), or the logger's save_dir, and let Lightning's checkpoints go "
            f"there: ModelCheckpoint(dirpath={folder!r})."
        )


def _lightnings(trainer: Any) -> str:
    """Where `ModelCheckpoint` puts its folder `checkpoints`."""
    root = str(trainer.default_root_dir)
    if not trainer.loggers:
        return root
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or root, str(logger.name), version)


class _Names(yaml.SafeDumper):
    """What YAML cannot hold, such as a shape that is a function, by its name: for whoever reads the file."""


_Names.add_multi_representer(
    object, lambda dumper, value: dumper.represent_str(getattr(value, "__name__", repr(value)))
)


class RunFolder:
    """The files of one run, locked against other runs.

    Args:
        path: The folder; created where needed.

    Attributes:
        records: The file of records.
        merged: The folder of merged models.

    Raises:
        CheckpointError: The folder cannot be written, or another run, which is named, is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records, self.merged = path / _RECORDS, path / _MERGED
        self._release: Callable[[], object] = lambda: None
        try:
            folder_lock.claim(path, remedy=_ELSEWHERE, name=_LOCK)
            self._release = weakref.finalize(self, folder_lock.release, path, name=_LOCK)  # also if nobody closes it
        except CheckpointError as error:
            if getattr(error.__cause__, "errno", None) not in _NO_LOCKS:
                raise
        atomic.remove_leftovers(path, "merges.*")  # of a run that was killed
        self._finish_moving()

    def close(self) -> None:
        """Let other runs use the folder."""
        self._release()

    def begin(self, notices: WarnOnce) -> str:
        """Make the folder that of a new run; what an earlier one left gets a number. Returns the run's identity."""
        self._move_aside(notices)
        identity = secrets.token_hex(6)
        self._sign(identity)
        return identity

    def resume(self, identity: str, notices: WarnOnce) -> str:
        """Make the folder that of a run that goes on; where another one has begun in it, the two change places.

        Args:
            identity: That of the run; empty where its checkpoint does not know it.
            notices: What the user was told already.

        Returns:
            The identity.
        """
        here = _read_identity(self.path / _IDENTITY)
        if here is None:
            identity = identity or secrets.token_hex(6)
            self._sign(identity)
        elif identity not in ("", here):
            number = _number_of(identity, self.path)
            self._move_aside(notices)
            if number is None:
                self._sign(identity)
            else:
                for path in reversed(self._paths()):
                    with suppress(FileNotFoundError):
                        _numbered(path, number).replace(path)
        return identity or str(here)

    def keep_config(self, config: Mapping[str, Any]) -> None:
        """The callback's keys as a YAML file that `from_config` takes; those of a resumed run take its place.

        Raises:
            CheckpointError: It cannot be written.
        """
        path = self.path / _CONFIG
        text = yaml.dump(dict(config), Dumper=_Names, sort_keys=False, allow_unicode=True)
        try:
            atomic.write(path, f"# ModelMerging.from_config({_CONFIG!r}) reads this\n{text}")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}. Free space there. {_ELSEWHERE}") from error

    def _move_aside(self, notices: WarnOnce) -> None:
        # the identity of a run that ended before its first record names nothing: one that starts again and again, as
        # under a scheduler that kills it early, would leave a file at each start
        if not any(os.path.lexists(path) for path in (self.records, self.merged)):
            return
        number = 1
        while any(os.path.lexists(_numbered(path, number)) for path in self._paths()):
            number += 1
        for path in self._paths():
            if os.path.lexists(path):
                path.rename(_numbered(path, number))
                if path in (self.records, self.merged):
                    notices.warn(str(path), f"{path} is of another run; it is now {_numbered(path, number)}.")

    def _finish_moving(self) -> None:
        """Move what a killed process left behind: the identity is put aside first and comes back last."""
        identity, *others = self._paths()
        left = [path for path in others if os.path.lexists(path)]
        lacking = [
            number
            for number in _numbers(self.path)
            if not all(os.path.lexists(_numbered(path, number)) for path in left)
        ]
        if os.path.lexists(identity) or not lacking:
            return
        # of several that may lack a file for good, the one that was moved last, by a time that a rename changes
        number = max(lacking, key=lambda number: _numbered(identity, number).lstat().st_ctime_ns)
        for path in left:
            if not os.path.lexists(_numbered(path, number)):
                path.rename(_numbered(path, number))

    def _paths(self) -> tuple[Path, ...]:
        """All of a run, in the order in which they are put aside."""
        return self.path / _IDENTITY, self.path / _CONFIG, self.records, self.merged

    def _sign(self, identity: str) -> None:
        path = self.path / _IDENTITY
        try:
            path.unlink(missing_ok=True)  # one that could not be read, or of a run that left nothing
            with path.open("x", encoding="utf-8") as file:  # new: nothing is written through a link
                json.dump({"run": identity}, file)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}. {_ELSEWHERE}") from error


def files_of(identity: str, folder: Path) -> tuple[Path, Path] | None:
    """Records and merged models of a run in a folder where it was; None where another has it and these are not there.

    Args:
        identity: That of the run; empty where its checkpoint does not know it.
        folder: Its folder then.
    """
    paths = folder / _RECORDS, folder / _MERGED
    if identity == "" or _read_identity(folder / _IDENTITY) in (None, identity):
        return paths
    number = _number_of(identity, folder)
    return None if number is None else (_numbered(paths[0], number), _numbered(paths[1], number))


def _number_of(identity: str, folder: Path) -> int | None:
    """Under which number the files of a run were put aside."""
    known = {_read_identity(_numbered(folder / _IDENTITY, number)): number for number in _numbers(folder)}
    return known.get(identity)


def _numbers(folder: Path) -> list[int]:
    """Those of all runs that were put aside in a folder."""
    stem, suffix = os.path.splitext(_IDENTITY)
    found = (path.name[len(stem) + 1 : -len(suffix)] for path in folder.glob(f"{stem}.*{suffix}"))
    return sorted(int(number) for number in found if number.isascii() and number.isdigit())


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _read_identity(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8") as file:
            # a thousand bytes hold any identity of ours; a file of another size is none
            return str(json.loads(file.read(1000))["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
