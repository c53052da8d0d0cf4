"""Processes that begin with the slow imports behind them: forked from one server per test process.

The server is started once and imports torch, Lightning and this package (`preloaded.py`); it runs nothing. A process of
it is as clean as a new interpreter, but for those imports, and costs a hundredth of the time.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["harness.preloaded"])


def run_forked(function: Callable[..., object], *arguments: str, timeout: float = 300.0) -> tuple[int, str]:
    """Run `function(*arguments)` in a process of its own, from the root of the repository.

    Args:
        function: At the top of a module that can be imported by its name.
        arguments: Texts.
        timeout: Seconds until the process is killed. What it started and left behind ends with it in any case.

    Returns:
        Its exit code (that of `sys.exit`; negative: ended by that signal) and all that it printed.
    """
    # the server looks for modules where its environment says, not where this process does
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(_ROOT), str(_ROOT / "tests")])):
        forkserver.ensure_running()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        process = _CONTEXT.Process(target=_run, args=(output.name, dict(os.environ), function, arguments))
        process.start()
        assert process.pid is not None
        try:
            process.join(timeout)
        finally:  # also of a test that is interrupted, by its own timeout above all
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # one so young that it does not lead its group yet
            process.join()
        return process.exitcode or 0, output.read()


def _run(output: str, environment: dict[str, str], function: Callable[..., object], arguments: tuple[str, ...]) -> None:
    os.setsid()  # of its own group, which ends as one
    assert "harness.preloaded" in sys.modules  # a server that cannot import says nothing
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
