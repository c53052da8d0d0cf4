"""Runs whose disk fills up: from a random step on, no file can be longer than so many bytes."""

import random
import resource
from pathlib import Path

from benchmarks.crashes import processes
from benchmarks.crashes.rows import Row
from benchmarks.crashes.run import Reference, Run
from benchmarks.crashes.training import STEPS, AtStep, train

_IN_LIGHTNINGS_OWN_FILE = "in _atomic_save"
_FROM_LAST_CHECKPOINT = 25


def filled(references: list[Reference], folder: Path, chance: random.Random, times: int) -> Row:
    """An error of ours that says what to do, nothing half written, and the exact run once there is room again."""
    row = Row("full disk", times=times)
    for index in range(times):
        reference = references[index % len(references)]
        _fill_once(row, reference, Run(folder, reference.setting), chance)
    return row


def _fill_once(row: Row, reference: Reference, run: Run, chance: random.Random) -> None:
    step, size = chance.randrange(min(STEPS, _FROM_LAST_CHECKPOINT)), chance.randrange(1, 1200)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    note = f"at step {step}, {size} bytes, {run.setting}:"
    ended = processes.run(lambda: train(run.folder, run.setting, None, [AtStep(step, fill)]))
    if _IN_LIGHTNINGS_OWN_FILE in ended.error:  # its checkpoint was the first file too large
        row.figures["Lightning's own file"] += 1
    elif ended.is_ours_with_a_remedy:
        row.figures["our error"] += 1
    else:
        row.wrong(f"{note} {ended.error or 'no error'}")
    for path in run.folder.glob("merged/step-*"):
        if not {"model.safetensors", "provenance.json"} <= {item.name for item in path.iterdir()}:
            row.wrong(f"{note} {path.name} looks complete and is not")
    if error := run.attempt().error:
        row.wrong(f"{note} afterwards {error}")
    else:
        row.judge(run, reference, note)
