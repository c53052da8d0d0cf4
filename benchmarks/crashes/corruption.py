"""Random bytes changed in snapshots, in the list of needs, and in the checkpoint that a run goes on from."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

from benchmarks.crashes import compare, processes
from benchmarks.crashes.processes import Break
from benchmarks.crashes.rows import Row
from benchmarks.crashes.run import Reference, Run
from benchmarks.crashes.training import AtStep, train

_KILLED_AT = 23  # between checkpoints, of which two are there


def corrupted(reference: Reference, folder: Path, chance: random.Random, times: int) -> Row:
    """Every corruption is detected, or changes nothing, or lies in bytes that are not ours and that torch believes."""
    row = Row("corruption", str(reference.setting), times=times)
    run, backup = Run(folder, reference.setting), folder.with_name("backup")
    shutil.rmtree(backup, ignore_errors=True)
    processes.run(
        lambda: train(folder, run.setting, None, [AtStep(_KILLED_AT, _die)]), Break(seconds=processes.PATIENCE)
    )
    folder.rename(backup)
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(backup, folder)
        _corrupt_once(row, reference, run, chance)
    return row


def _corrupt_once(row: Row, reference: Reference, run: Run, chance: random.Random) -> None:
    checkpoint = compare.checkpoints(run.folder)[-1]
    snapshots = sorted((run.folder / "window").glob("*-*-*.*"))
    path = chance.choice([*snapshots, run.folder / "window" / "checkpoints.json", checkpoint, checkpoint])
    ours = compare.our_state(checkpoint)
    content = _damaged(path.read_bytes(), chance)
    path.write_bytes(content)
    row.runs += 1
    ended = run.attempt_from(checkpoint)
    if ended.is_ours_with_a_remedy:
        row.figures["detected by us"] += 1
    elif ended.error and path == checkpoint and not ended.is_ours:
        row.figures["detected by torch or Lightning"] += 1
    elif ended.error:
        row.wrong(f"of {path.name}: {ended.error}")
    elif not (wrong := compare.differences(reference.outcome, compare.outcome(run.folder))):
        row.figures["harmless"] += 1
    elif path == checkpoint and _still_holds(content, ours, run.folder):
        row.figures["of torch's bytes, which it believes"] += 1  # weights, optimizer state, counters of Lightning's
    else:
        row.wrong(f"of {path.name}: differs in {wrong}")


def _damaged(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] ^= chance.randint(1, 255)
    return bytes(changed)


def _still_holds(content: bytes, ours: dict[str, Any], folder: Path) -> bool:
    """Whether a damaged checkpoint's state of ours is what it was, so that the damage lies in torch's own."""
    path = folder / "damaged.ckpt"  # the run may have written the checkpoint again
    path.write_bytes(content)
    try:
        return compare.our_state(path) == ours
    except Exception:
        return False
    finally:
        path.unlink()


def _die() -> None:
    import os

    os.kill(os.getpid(), signal.SIGKILL)
