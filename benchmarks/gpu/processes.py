"""A process for each part, with a time limit: a crash of the device, a hang or a lack of memory ends one part alone."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Report

_CONTEXT = multiprocessing.get_context("forkserver")
# What all parts import, once: seconds each where disks are slow. None of it touches the device, as a fork must not.
_PRELOADED = ["torch", "lightning.pytorch", "numpy"]


def run_part(name: str, setting: Mapping[str, Any], rows: Path, limit: float) -> tuple[float, str]:
    """Run `benchmarks.gpu.<name>`.

    Returns:
        How long it took, and what went wrong; empty if nothing did.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    # Both are read when a library is imported or first used, in the process that all parts are forked from.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, no matrix product is reproducible
    if setting["rehearses"]:
        os.environ["TRITON_INTERPRET"] = "1"
    errors = rows.with_suffix(".error")
    start = time.monotonic()
    process = _CONTEXT.Process(target=_run, args=(name, dict(setting), str(rows), str(errors), list(sys.path)))
    process.start()
    try:
        process.join(limit)
        is_late = process.exitcode is None
    finally:  # also of Ctrl-C, which does not reach a session of its own
        if process.exitcode is None:
            _kill(process)
    if is_late:
        return time.monotonic() - start, f"stopped after its limit of {limit:.0f} s"
    if errors.exists():
        return time.monotonic() - start, errors.read_text().strip()
    return time.monotonic() - start, "" if process.exitcode == 0 else f"exit code {process.exitcode}"


def _kill(process: Any) -> None:
    """With its compile workers and tests."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no session of its own yet
        process.kill()
    process.join()


def _run(name: str, setting: dict[str, Any], rows: str, errors: str, path: list[str]) -> None:
    os.setsid()
    sys.path[:] = path
    try:
        from benchmarks.gpu.setting import Setting

        warnings.simplefilter("ignore")
        importlib.import_module(f"benchmarks.gpu.{name}").measure(Setting(**setting), Report(Path(rows), name))
    except BaseException as error:
        traceback.print_exc()
        Path(errors).write_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # NCCL and compile workers may hold up an ordinary exit
