"""Processes that begin with the slow imports behind them: forked from one server per test process.

The server is forked from the test process before that has collected anything, and runs nothing. A process of it is as
clean as a new interpreter, but for the imports of torch, Lightning and this package, and costs a hundredth of the time.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

_ROOT = Path(__file__).resolve().parents[2]
_IMPORTS = ("lightning.pytorch", "pretrain_merge.callbacks", "numpy", "torch.distributed.fsdp")
_FORK = multiprocessing.get_context("fork")
_server: Connection | None = None


def start_server(*, imports_are_needed: bool) -> None:
    """Fork the server. Call it once, before tests are collected and while nothing is captured.

    Args:
        imports_are_needed: The test process will import all of it anyway: it does now, so that the server has it for
            nothing. Else the server imports when it is first asked.
    """
    global _server
    if imports_are_needed:
        _import_all()
    _server, asked = _FORK.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of forks beside threads; those are idle
        process = os.fork()  # no Process: multiprocessing would wait at the end for it, as it waits for that end
    if process == 0:
        try:
            _server.close()  # or it would not see that end
            _serve(asked)
        finally:
            os._exit(1)  # never into pytest
    asked.close()


def run_forked(function: Callable[..., object], *arguments: str, timeout: float = 300.0) -> tuple[int, str]:
    """Run `function(*arguments)` in a process of its own, from the root of the repository; one at a time.

    Args:
        function: At the top of a module that can be imported by its name.
        arguments: Texts.
        timeout: Seconds until the process is killed.

    Returns:
        Its exit code (that of `sys.exit`; negative: ended by that signal) and all that it printed.
    """
    assert _server is not None
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        _server.send((output.name, dict(os.environ), function, arguments))
        process = _server.recv()
        try:
            _server.poll(timeout)
        finally:  # also where pytest's own limit ended the wait
            if not _server.poll():
                os.kill(process, signal.SIGKILL)
            code = _server.recv()
        return code, output.read()


def _import_all() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)


def _serve(asked: Connection) -> NoReturn:
    while True:
        try:
            job = asked.recv()
        except EOFError:
            os._exit(0)
        _import_all()
        process = _FORK.Process(target=_run, args=job)
        process.start()
        asked.send(process.pid)
        process.join()
        asked.send(process.exitcode)


def _run(output: str, environment: dict[str, str], function: Callable[..., object], arguments: tuple[str, ...]) -> None:
    log = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment)  # of now; the server's is of when it was started
    os.chdir(_ROOT)
    sys.path.insert(0, str(_ROOT))
    code = function(*arguments)
    sys.stdout.flush()
    sys.exit(code)


def run_code(code: str) -> None:
    """What `python -W error -c CODE` does; a function for `run_forked`."""
    warnings.simplefilter("error")
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
