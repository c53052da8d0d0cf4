"""A merge, a sweep, killed at moments that are spread over the whole of it, and run again until it ends."""

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pretrain_merge import merge_checkpoints, sweep_checkpoints

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["benchmarks.offline.kills", "pretrain_merge.offline.sweep", "pretrain_merge.kernels.flat"]
)


def killed(folder: Path, num_kills: int) -> list[dict[str, Any]]:
    """A row for a merge, in files of a tenth of it, and one for a sweep."""
    return [_killed_in(job, folder, num_kills) for job in (_merge_once, _sweep_once)]


def _killed_in(job: Callable[[str, str], object], folder: Path, num_kills: int) -> dict[str, Any]:
    """Processes are forked from one that has imported everything, so that most moments are within the work."""
    drawn, name = random.Random(0), job.__name__.strip("_").partition("_")[0]
    out, reference = folder / f"killed-{name}", folder / f"reference-{name}"
    assert _forked(job, folder, reference, after=None) == 0
    start = time.monotonic()
    assert _forked(job, folder, folder / f"timed-{name}", after=None) == 0
    whole = time.monotonic() - start
    expected, num_wrong, num_done, num_killed = _contents(reference), 0, 0, 0
    while num_killed < num_kills:
        code = _forked(job, folder, out, after=drawn.uniform(0.0, 1.1) * whole)
        num_killed += code == -signal.SIGKILL
        num_wrong += code not in (0, -signal.SIGKILL)
        if out.exists():
            num_done += 1
            num_wrong += _contents(out) != expected
            shutil.rmtree(out)
    print(f"{name}: {num_killed} kills, {num_done} ended between them, {num_wrong} wrong")
    return {"what": f"kills of {name}", "kills": num_killed, "ended": num_done, "wrong": num_wrong}


def _forked(job: Callable[[str, str], object], folder: Path, out: Path, *, after: float | None) -> int:
    """The exit code of a process that does the job, and is killed after so many seconds unless it has ended."""
    process = _SERVER.Process(target=job, args=(str(folder), str(out)))
    process.start()
    process.join(after)
    if process.exitcode is None:
        process.kill()
    process.join()
    return process.exitcode or 0


def _merge_once(folder: str, out: str) -> None:
    size = sum(path.stat().st_size for path in Path(folder, "hf/checkpoint-100").iterdir()) // 10
    merge_checkpoints([Path(folder, "hf")], out, largest_file=size)


def _sweep_once(folder: str, out: str) -> None:
    sweep_checkpoints([Path(folder, "hf")], out, _norm_of, window=4, views=["sma", "sma2"])


def _norm_of(folder: Path) -> dict[str, float]:
    return {"val_loss": load_file(folder / "model.safetensors")["model.norm.weight"].double().square().sum().item()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
