"""Real processes on gloo, for what several ranks must do together.

`on_ranks` runs a function of a test file on every rank and returns what each returned. One process imports the file
once and forks the ranks; they meet through a file. Where a rank fails or the time is up, every rank still alive prints
the stacks of all its threads before it is killed, and all of it is in the error.
"""

import faulthandler
import importlib.util
import inspect
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness.forks import run_forked

_DUMP = "dump"
_GRACE = 1.0  # seconds that the other ranks get to end by themselves, and to print their stacks


def on_ranks(function: Callable[..., Any], *args: Any, num_ranks: int = 2, timeout: float = 60.0) -> list[Any]:
    """Run `function(*args)` on every rank of a gloo process group.

    Args:
        function: A function at the top of a test file.
        args: JSON values.
        num_ranks: Processes in the group.
        timeout: Seconds from the start of the ranks; importing the file does not count.

    Returns:
        What each rank returned, by rank: whatever `torch.save` takes and loads without pickles.

    Raises:
        AssertionError: A rank failed or the time was up; holds the output and the stacks of every rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = [inspect.getfile(function), function.__name__, folder, str(num_ranks), str(timeout), json.dumps(args)]
        code, output = run_forked(_fork_ranks, *job)
        if code:
            raise AssertionError(f"{function.__name__} on {num_ranks} ranks:\n{output}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _fork_ranks(file: str, name: str, folder: str, num_ranks: str, timeout: str, args: str) -> int:
    torch.set_num_threads(1)
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    function = getattr(module, name)

    running = {}
    for rank in range(int(num_ranks)):
        if (pid := os.fork()) == 0:
            _run_rank(function, json.loads(args), Path(folder), rank, int(num_ranks))
        running[pid] = rank
    codes = _wait(running, Path(folder), time.monotonic() + float(timeout))
    if failed := {rank: code for rank, code in codes.items() if code != 0}:
        for rank in range(int(num_ranks)):
            print(f"--- rank {rank}: {failed.get(rank, 0)} ---")
            print((Path(folder) / f"{rank}.log").read_text(errors="replace"))
    return len(failed)


def _run_rank(function: Callable[..., Any], args: list[Any], folder: Path, rank: int, num_ranks: int) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    threading.Thread(target=_dump_stacks_on_request, args=(folder,), daemon=True).start()
    try:
        store = dist.FileStore(str(folder / "rendezvous"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(minutes=5))
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo aborts about a quarter of plain exits after a DCP save


def _dump_stacks_on_request(folder: Path) -> None:
    # by a file and no signal: a Trainer gives all signals back to those whom Python knows, and faulthandler is none
    while not (folder / _DUMP).exists():
        time.sleep(0.1)
    faulthandler.dump_traceback(all_threads=True)


def _wait(running: dict[int, int], folder: Path, deadline: float) -> dict[int, str | int]:
    """Exit codes by rank; a rank that did not end by itself has a word instead."""
    codes: dict[int, str | int] = {}
    while running and time.monotonic() < deadline:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                if status:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.01)
    if running:
        (folder / _DUMP).touch()
        time.sleep(_GRACE)
    for pid, rank in running.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank] = "still running, stacks below"
    return codes
