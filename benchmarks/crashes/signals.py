"""Runs that get signals: at random moments, or at chosen ones."""

import random
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.crashes.processes import Break
from benchmarks.crashes.rows import Row
from benchmarks.crashes.run import Reference, Run

_BREAKS_PER_RUN = 8

CHOSEN = [
    Break(call="replace", count=2),  # a slot of the disk store, between its bytes and its name
    Break(call="merge", count=2),  # one view is in the model
    Break(call="sum of a block", count=7, before=False),
    Break(call="fsync", count=9, before=False),
    Break(call="rename", count=1),  # a merged model, written and not yet published
    Break(call="torch.save", count=1),  # after the window, before the checkpoint that needs it
    Break(call="save_checkpoint", count=1, before=False),  # before what it made superfluous goes
    Break(call="crc32", count=9),
    Break(call="rename", count=3, before=False),
]


def broken_at_random(reference: Reference, folder: Path, chance: random.Random, by: int, times: int) -> Row:
    """Signals at random moments, as many as are wanted; every run is let end and compared."""
    row = Row(signal.Signals(by).name, str(reference.setting))
    while row.times < times:
        run = Run(folder, reference.setting, save_on_exception=by == signal.SIGTERM and chance.random() < 0.5)
        wanted = min(_BREAKS_PER_RUN, times - row.times)
        _break_and_judge(
            row, run, reference, (reference.random_break(chance, by) for _ in range(4 * wanted)), wanted, chance
        )
    return row


def broken_at_chosen_moments(reference: Reference, folder: Path, breaks: Sequence[Break] = CHOSEN) -> Row:
    """One run that is killed in or between the same calls every time."""
    row = Row("chosen SIGKILL", str(reference.setting))
    _break_and_judge(row, Run(folder, reference.setting), reference, breaks, len(breaks), None)
    return row


def _break_and_judge(
    row: Row, run: Run, reference: Reference, breaks: Iterable[Break], wanted: int, chance: random.Random | None
) -> None:
    done: list[Break] = []
    for break_ in breaks:
        ended = run.attempt(break_, chance)
        if not ended.was_broken:  # it ended before, well or not
            break
        done.append(break_)
        row.times += 1
        if ended.was_killed:
            row.figures["killed in the end"] += 1
        if len(done) == wanted:
            break
    if not ended.error and not (run.folder / "final.pt").exists():
        ended = run.attempt()
    if ended.error:
        row.runs += 1
        row.wrong(f"after {done}: {ended.error}")
    else:
        row.judge(run, reference, f"after {done}")
