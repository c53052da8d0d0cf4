"""One run through all its breaks: which checkpoint it goes on from, and what it is compared with."""

import random
import shutil
import signal
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.crashes import compare, processes
from benchmarks.crashes.processes import CALLS, Break, Ended
from benchmarks.crashes.training import Setting, train


@dataclass
class Reference:
    """A run that nothing happened to: its folder, what it ended with, and how long it took."""

    setting: Setting
    folder: Path
    outcome: compare.Outcome
    seconds: float

    @classmethod
    def made(cls, setting: Setting, folder: Path) -> "Reference":
        start = time.monotonic()
        ended = processes.run(lambda: train(folder, setting, None), num_ranks=setting.num_processes)
        if ended.error:
            raise RuntimeError(ended.error)
        return cls(setting, folder, compare.outcome(folder), time.monotonic() - start)

    def random_break(self, chance: random.Random, by: int) -> Break:
        """A moment of time, or a call; of any rank, and sometimes the others notice before they are killed.

        A SIGTERM goes to all ranks, as from a launcher, which kills those that have not ended after a while.
        """
        if by == signal.SIGTERM and self.setting.num_processes > 1:
            return Break(by, None, seconds=chance.uniform(0, self.seconds), grace=3.0)
        rank = chance.randrange(self.setting.num_processes)
        grace = chance.choice([0.0, 0.5])
        if chance.random() < 0.5:
            return Break(by, rank, seconds=chance.uniform(0, self.seconds), grace=grace)
        count = 1 + int(chance.expovariate(0.25))
        return Break(by, rank, call=chance.choice(list(CALLS)), count=count, before=chance.random() < 0.5, grace=grace)


@dataclass
class Run:
    """A folder that a run is broken off and resumed in.

    Attributes:
        folder: Emptied at first.
        setting: Of the run.
        save_on_exception: Whether a checkpoint is saved because of a SIGTERM.
    """

    folder: Path
    setting: Setting
    save_on_exception: bool = False
    _of_another_past: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def attempt(self, break_: Break | None = None, chance: random.Random | None = None) -> Ended:
        """Go on from the newest checkpoint, by chance from an older one."""
        usable = self._usable()
        checkpoint = usable[-1] if usable else None
        if chance is not None and len(usable) > 1 and chance.random() < 0.2:
            checkpoint = chance.choice(usable[:-1])
        return self.attempt_from(checkpoint, break_)

    def attempt_from(self, checkpoint: Path | None, break_: Break | None = None) -> Ended:
        """Go on from this checkpoint, or begin."""
        # the records after it are cut off, so what was saved after it is of another past until it is saved again
        step = compare.step_of(checkpoint) if checkpoint is not None else 0
        later = [path for path in compare.checkpoints(self.folder) if compare.step_of(path) > step]
        self._of_another_past |= {(path.name, path.stat().st_mtime_ns) for path in later}
        return processes.run(
            lambda: train(self.folder, self.setting, checkpoint, save_on_exception=self.save_on_exception),
            break_,
            num_ranks=self.setting.num_processes,
        )

    def _usable(self) -> list[Path]:
        return [
            path
            for path in compare.checkpoints(self.folder)
            if (path.name, path.stat().st_mtime_ns) not in self._of_another_past
            and zipfile.is_zipfile(path)
            and self._is_between_steps(path)
        ]

    def _is_between_steps(self, path: Path) -> bool:
        """Lightning's own inexact case: ModelCheckpoint saves again in the first micro-batch after a resume.

        The gradients that are accumulated by then are in no checkpoint, so no run can go on exactly from it.
        """
        if self.setting.accumulate == 1:
            return True
        loop = torch.load(path, weights_only=True)["loops"]["fit_loop"]
        return int(loop["epoch_loop.batch_progress"]["total"]["ready"]) % self.setting.accumulate == 0
