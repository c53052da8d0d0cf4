"""Work beside training: commands, or functions, that are handed a folder, one after another, and never waited for.

This module knows processes, threads and what a command prints. It knows no models and no loggers.
"""

import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pretrain_merge.errors import ConfigError, nearest

PLACEHOLDERS = ("folder", "step", "view")
_NAMED = re.compile(r"\{([a-z_]+)\}")
_MOST_OUTPUT = 2**20  # bytes from the end of what a command prints; an answer is a line
_MOST_SAID = 300  # characters of a failing command's last words
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
# A command that is started by a rank is not one: a library in it that sees these waits for other ranks for ever.
_OF_A_RANK = re.compile(
    r"(RANK|WORLD_SIZE|MASTER_(ADDR|PORT)|(LOCAL|GROUP|ROLE|NODE)_(RANK|WORLD_SIZE)|LOCAL_WORLD_SIZE|ROLE_NAME"
    r"|TORCHELASTIC_.*)"
)
Work = str | Callable[[Path, int], Any]


@dataclass(frozen=True)
class Errand:
    """One folder to be handed over.

    Attributes:
        folder: It stays as it is until the errand has ended.
        step: Of what is in it.
        view: Whose merge that is.
    """

    folder: Path
    step: int
    view: str


@dataclass(frozen=True)
class Outcome:
    """How an errand ended.

    Attributes:
        errand: Which.
        numbers: By name, as the command printed them or the function returned them.
        failure: Why there are none; empty where it went well.
        seconds: How long it took.
    """

    errand: Errand
    numbers: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0


def refuse_command(command: str) -> list[str]:
    """The words of a command, as a shell would split them; none is run.

    Raises:
        ConfigError: It is not one, or has a placeholder that nobody fills in.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"on_publish: {command!r} cannot be split into words ({error}). Close its quotes.") from error
    for name in _NAMED.findall(command):
        if name not in PLACEHOLDERS:
            meant = nearest(name, PLACEHOLDERS)
            raise ConfigError(
                f"on_publish: {{{name}}} is not known. Allowed: {', '.join(f'{{{item}}}' for item in PLACEHOLDERS)}"
                f"{f'; did you mean {{{meant}}}?' if meant else '.'}"
            )
    if not words:
        raise ConfigError("on_publish: the command is empty. Name a program, such as 'python evaluate.py {folder}'.")
    return words


def refuse_missing_program(work: Work | None) -> None:
    """Find out before training whether there is such a program on this host.

    Raises:
        ConfigError: There is none.
    """
    program = refuse_command(work)[0] if isinstance(work, str) else None
    if program is not None and "{" not in program and shutil.which(program) is None:
        raise ConfigError(
            f"on_publish: {program!r} is not a program on this host. Allowed: one that is found in PATH, or its path; "
            f"the command is run without a shell (for one: sh -c '…')."
        )


class Errands:
    """A queue, and a thread that goes through it.

    Args:
        work: A command with placeholders, or a function of folder and step that returns numbers by name, or nothing.
        timeout: Seconds that one errand may take.
        log: Of an errand, the file that gets what its command says; None: nothing is kept.
    """

    def __init__(self, work: Work, timeout: float, log: Callable[[Errand], Path | None] = lambda errand: None) -> None:
        self._work, self._timeout, self._log = work, timeout, log
        self._waiting: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()  # None: there will be no more
        self._ended: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._open: dict[Path, Errand] = {}  # waiting or under way; written here, so that no lock is needed
        self._process: subprocess.Popen[bytes] | None = None  # of the command that is under way
        self._is_closed = False
        self._thread: threading.Thread | None = None  # from the first errand on

    def add(self, errand: Errand) -> None:
        """Hand a folder over, unless it waits already."""
        if errand.folder in self._open:
            return
        self._open[errand.folder] = errand
        self._waiting.put(errand)
        if self._thread is None:
            # a daemon: a function that hangs must not keep the process from ending
            self._thread = threading.Thread(target=self._go, name="pretrain-merge errands", daemon=True)
            self._thread.start()

    def ended(self) -> list[Outcome]:
        """Those that ended since this was asked last."""
        outcomes: list[Outcome] = []
        with suppress(queue.Empty):
            while True:
                outcomes.append(self._ended.get_nowait())
        for outcome in outcomes:
            self._open.pop(outcome.errand.folder, None)
        return outcomes

    @property
    def open(self) -> list[Errand]:
        """Those that wait or are under way, as far as `ended` has told."""
        return list(self._open.values())

    def close(self) -> None:
        """End what is under way, and forget what waits."""
        self._is_closed = True
        self._waiting.put(None)
        if self._process is not None:
            _end(self._process)

    def _go(self) -> None:
        while (errand := self._waiting.get()) is not None and not self._is_closed:
            begun = time.monotonic()
            numbers: Mapping[str, float] = {}
            failure = ""
            try:
                run = self._command if isinstance(self._work, str) else self._function
                numbers = run(errand)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            if not self._is_closed:  # else it was ended, and did not fail
                self._ended.put(Outcome(errand, numbers, failure, time.monotonic() - begun))

    def _command(self, errand: Errand) -> Mapping[str, float]:
        values = {"folder": str(errand.folder), "step": str(errand.step), "view": errand.view}
        words = [
            _NAMED.sub(lambda match: values.get(match[1], match[0]), word) for word in shlex.split(str(self._work))
        ]
        environment = {name: value for name, value in os.environ.items() if not _OF_A_RANK.fullmatch(name)}
        log = self._log(errand)
        with tempfile.TemporaryFile() as printed, log.open("w+b") if log else tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=printed, stderr=said, env=environment, start_new_session=True
            )
            if self._is_closed:  # between the question before and the start
                _end(self._process)
            try:
                code = self._process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                _end(self._process)
                raise TimeoutError(f"it took more than {self._timeout:g} seconds and was ended") from None
            finally:
                self._process = None
            text, complaint = _end_of(printed), _end_of(said)
            said.write(text.encode())
            if code:
                raise RuntimeError(f"it ended with code {code}: {_last_words(complaint.strip() or text)}")
        return _numbers(_json_in(text))

    def _function(self, errand: Errand) -> Mapping[str, float]:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def call() -> None:
            try:
                answers.put(self._work(errand.folder, errand.step))  # type: ignore[operator]
            except BaseException as error:
                answers.put(error)

        threading.Thread(target=call, name="pretrain-merge on_publish", daemon=True).start()
        try:
            answer = answers.get(timeout=self._timeout)
        except queue.Empty:
            raise TimeoutError(f"it took more than {self._timeout:g} seconds; it is not waited for any more") from None
        if isinstance(answer, BaseException):
            raise answer
        return _numbers({} if answer is None else answer)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The command and all that it started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            return


def _end_of(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MOST_OUTPUT))
    return file.read().decode("utf-8", "replace")


def _last_words(text: str) -> str:
    return " ".join(text.split())[-_MOST_SAID:] or "it said nothing"


def _json_in(text: str) -> Any:
    """What a command prints: one JSON object as a whole, or its last line that is one; nothing where none is."""
    for candidate in [text, *reversed(text.splitlines())]:
        with suppress(ValueError, RecursionError):
            found = json.loads(candidate)
            if isinstance(found, dict):
                return found
    return {}


def _numbers(answer: Any) -> dict[str, float]:
    """Numbers by name; those of an object inside another get both names, with a slash between."""
    if not isinstance(answer, Mapping):
        raise TypeError(f"{type(answer).__name__} was returned, and numbers by name are asked for")
    found: dict[str, float] = {}
    for name, value in answer.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in _numbers(value).items()}
        elif not isinstance(value, str | bool | list | tuple | None):  # what describes the numbers
            found[str(name)] = float(value)
    return found
