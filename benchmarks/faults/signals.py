"""Runs that get signals: at random moments, or at chosen ones."""

import random
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.faults.processes import Break
from benchmarks.faults.rows import Row
from benchmarks.faults.run import Reference, Run

_BREAKS_PER_RUN = 8

# Before or after the count-th call: in a merge, in a slot of a disk store or a snapshot beside a checkpoint, in the
# list of needs, in a merged model, around Lightning's own checkpoint.
CHOSEN = [
    Break(call="weighted_sum_", count=2),
    Break(call="fsync", count=3, before=False),
    Break(call="replace", count=6),
    Break(call="torch.save", count=1),
    Break(call="save_checkpoint", count=2, before=False),
    Break(call="rename", count=1),
    Break(call="rename", count=1, before=False),
    Break(call="crc32", count=9),
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
        if len(done) == wanted:
            break
    if not ended.error and not (run.folder / "final.pt").exists():
        ended = run.attempt()
    if ended.error:
        row.runs += 1
        row.wrong(f"after {done}: {ended.error}")
    else:
        row.judge(run, reference, f"after {done}")
