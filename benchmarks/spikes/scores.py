"""What the detector makes of recorded runs, as a callback would read them: at every tenth step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.spikes.runs import collapse
from pretrain_merge.spikes import SpikeDetector

READ_EVERY = 10
_BEFORE = 20  # steps before a collapse in which an alarm is not a false one


@dataclass(frozen=True)
class Score:
    """Over some runs.

    Attributes:
        num_stable: Steps of runs that never collapsed, and of the others up to their collapse.
        num_false: Spikes that were seen among these.
        delays: Steps from the onset of each collapse to the read that told of it; None: it was never told.
    """

    num_stable: int
    num_false: int
    delays: tuple[int | None, ...]

    @property
    def per_thousand(self) -> float:
        """False alarms per thousand stable steps."""
        return 1000 * self.num_false / self.num_stable if self.num_stable else float("nan")

    def within(self, steps: int) -> int:
        """Collapses that were told within so many steps."""
        return sum(delay is not None and delay <= steps for delay in self.delays)


def score(runs: Mapping[str, NDArray[np.float32]], *, with_norm: bool, definition: str) -> Score:
    """That of a detector with its defaults.

    Args:
        runs: By name, `(2, step)`: loss and norm of the gradient.
        with_norm: Whether the detector is told of the norm.
        definition: Of a collapse.
    """
    num_stable = num_false = 0
    delays: list[int | None] = []
    for losses, norms in runs.values():
        onset = collapse(losses.tolist(), definition)
        told = list(_told(losses, norms if with_norm else None))
        num_stable += len(losses) if onset is None else onset
        num_false += sum(onset is None or step < onset - _BEFORE for step in told)
        if onset is not None:
            delays.append(next((step - onset for step in told if step >= onset - _BEFORE), None))
    return Score(num_stable, num_false, tuple(delays))


def _told(losses: NDArray[np.float32], norms: NDArray[np.float32] | None) -> Iterable[int]:
    """Steps of the reads that told of a new spike."""
    detector = SpikeDetector()
    for step, loss in enumerate(losses, start=1):
        detector.observe(step, torch.tensor(loss), None if norms is None else torch.tensor(norms[step - 1]))
        if step % READ_EVERY == 0:
            onset = detector.read(step)
            if onset is not None and onset.is_new:
                yield step
