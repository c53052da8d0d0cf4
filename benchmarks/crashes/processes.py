"""Child processes that are broken off: one job of one or more ranks, and a signal at a moment of time or in a call.

The parent imports what takes long, runs no torch of its own, and forks.
"""

import faulthandler
import os
import resource
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from pretrain_merge.errors import CheckpointError, PretrainMergeError
from pretrain_merge.stores import device, streaming
from pretrain_merge.window import block_mean

# In a merge, a sum, a slot, a file of the window, a merged model, the records, in and around Lightning's checkpoint.
CALLS: dict[str, list[tuple[Any, str]]] = {
    "merge": [(module, "weighted_sum_") for module in (device, streaming)],
    "sum of a block": [(block_mean, "weighted_sum_")],
    "replace": [(os, "replace")],
    "rename": [(os, "rename")],
    "fsync": [(os, "fsync")],
    "crc32": [(zlib, "crc32")],
    "link": [(os, "link")],
    "torch.save": [(torch, "save")],
    "save_checkpoint": [(pl.strategies.Strategy, "save_checkpoint")],
    "write_text": [(Path, "write_text")],
}
PATIENCE = 120.0  # seconds that a job may take
_FAILED = 3


@dataclass(frozen=True)
class Break:
    """A signal: after some seconds, or before or after the count-th call of something.

    Attributes:
        by: The signal.
        rank: Who gets it; None: all, after some seconds.
        seconds: After how long, where `call` is empty.
        call: A key of `CALLS`.
        count: Which call of it.
        before: Whether it comes before the call is made, or after.
        grace: Seconds that other ranks get to notice, or all to end, before they are killed, as a launcher does.
    """

    by: int = signal.SIGKILL
    rank: int | None = 0
    seconds: float = 0.0
    call: str = ""
    count: int = 1
    before: bool = True
    grace: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        was_broken: By the signal that was meant.
        error: What its first failed rank raised; empty where it ended well or was broken.
        was_killed: After a signal to all that they did not end by.
    """

    was_broken: bool
    error: str = ""
    was_killed: bool = False

    @property
    def is_ours(self) -> bool:
        return self.error.startswith("ours")

    @property
    def is_ours_with_a_remedy(self) -> bool:
        return self.error.startswith("ours CheckpointError remedy")


def run(work: Callable[[], None], break_: Break | None = None, *, num_ranks: int = 1) -> Ended:
    """Do some work in a process of its own, or in several that form a group."""
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name) / f"{rank}.txt" for rank in range(num_ranks)]
        ranks = {_child(work, rank, logs, break_): rank for rank in range(num_ranks)}
        statuses = _wait(ranks, break_)
        errors = [log.read_text() for log in logs if log.exists()]
    if break_ is not None and break_.rank is None and any(statuses.values()):
        was_killed = any(_ended_by(status, signal.SIGKILL) for status in statuses.values())
        ours = [error for error in errors if error.startswith("ours") and not _lost_a_peer(error)]
        return Ended(was_broken=not ours, error="\n".join(ours), was_killed=was_killed)
    victim = statuses[break_.rank] if break_ is not None and break_.rank is not None else 0
    if break_ is not None and _ended_by(victim, break_.by):
        return Ended(was_broken=True)
    if break_ is not None and break_.by == signal.SIGTERM and errors and errors[0].startswith("other SIGTERMException"):
        return Ended(was_broken=True)
    if any(statuses.values()):
        return Ended(was_broken=False, error="\n".join(errors) or f"wait statuses {statuses}")
    return Ended(was_broken=False)


def _child(work: Callable[[], None], rank: int, logs: list[Path], break_: Break | None) -> int:
    process = os.fork()
    if process:
        return process
    code = _FAILED
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        faulthandler.disable()
        if break_ is not None and break_.call and break_.rank == rank:
            _signal_in_call(break_)
        if len(logs) > 1:
            store = torch.distributed.FileStore(str(logs[0].with_name("rendezvous")), len(logs))
            torch.distributed.init_process_group(
                "gloo", store=store, rank=rank, world_size=len(logs), timeout=timedelta(seconds=PATIENCE)
            )
        work()
        code = 0
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        whose = "ours" if isinstance(error, PretrainMergeError) else "other"
        remedy = "remedy" if isinstance(error, CheckpointError) and str(error).count(".") else ""
        logs[rank].write_text(f"{whose} {type(error).__name__} {remedy}\n{error}\n{traceback.format_exc()}")
    finally:
        os._exit(code)


def _wait(ranks: dict[int, int], break_: Break | None) -> dict[int, int]:
    """The wait status of every rank. The others of one that ended badly are killed: a kill of one ends the job."""
    start = time.monotonic()
    signal_at = start + break_.seconds if break_ is not None and not break_.call else float("inf")
    deadline, has_failed = start + PATIENCE, False
    statuses: dict[int, int] = {}
    while len(statuses) < len(ranks):
        running = {process: rank for process, rank in ranks.items() if rank not in statuses}
        for process, rank in running.items():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                statuses[rank] = status
        now = time.monotonic()
        if break_ is not None and now >= signal_at:
            _kill(
                (process for process, rank in running.items() if break_.rank in (None, rank) and rank not in statuses),
                break_.by,
            )
            signal_at = float("inf")
            if break_.rank is None:
                has_failed, deadline = True, now + break_.grace
        if any(statuses.values()) and not has_failed:
            has_failed, deadline = True, now + (break_.grace if break_ is not None else 1.0)
        if now >= deadline:
            _kill((process for process, rank in running.items() if rank not in statuses), signal.SIGKILL)
        time.sleep(0.002)
    if not has_failed and now >= deadline:
        raise TimeoutError(f"a job took more than {PATIENCE:.0f} seconds")
    return statuses


def _lost_a_peer(error: str) -> bool:
    """Whether a rank failed because another had ended first, by the same signal."""
    return any(words in error for words in ("Connection reset by peer", "Connection closed by peer", "Broken pipe"))


def _ended_by(status: int, by: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == by


def _kill(processes: Iterable[int], by: int) -> None:
    for process in processes:
        os.kill(process, by)


def _signal_in_call(break_: Break) -> None:
    """In the child: the count-th call of something sends a signal to this process, before or after it is made."""
    left = [break_.count]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            mine = left[0] == 0  # a call may make others
            if mine and break_.before:
                os.kill(os.getpid(), break_.by)
            result = original(*arguments, **options)
            if mine and not break_.before:
                os.kill(os.getpid(), break_.by)
            return result

        return call

    for owner, attribute in CALLS[break_.call]:
        setattr(owner, attribute, counted(getattr(owner, attribute)))
