"""A loss spike as a break: heard of from the training loss, on all ranks at the same step.

This module knows when losses are read and what a spike does to a window. What a spike is, the detector knows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain_merge.cadence import Progress
from pretrain_merge.spikes import READ_EVERY, SpikeDetector
from pretrain_merge.window.breaks import Breaks
from pretrain_merge.window.window import Window

# Steps. Of nine collapses five had done damage up to 100 steps before the loss showed it. Long windows move slowly.
_DISTRUSTED, _SHARE_DISTRUSTED = 100, 0.05
# Steps from where a spike begins to the read that tells of it, at most: those of a read, and of the few that are judged
# together before.
_TOLD_WITHIN = 2 * READ_EVERY


@dataclass(frozen=True)
class Damage:
    """What a spike may have damaged.

    Attributes:
        after: The last step whose weights are trusted; those of all steps after it are not.
        reason: What was seen.
    """

    after: int
    reason: str


class SpikeBreaks:
    """Judges each step, and where a spike began ends the segment and drops what it may have damaged.

    Args:
        window: From which snapshots are dropped.
        breaks: Told of each spike.
        distrust: Steps before the first step of a spike whose snapshots are dropped; None: 100, or a twentieth of what
            the window spans where that is more.
    """

    def __init__(self, window: Window, breaks: Breaks, distrust: int | None) -> None:
        self._window, self._breaks, self._distrust = window, breaks, distrust
        self._detector = SpikeDetector()

    def judge(
        self,
        before: Progress,
        now: Progress,
        loss: Tensor | float | None,
        gradient_norm: Tensor | float | None,
        *,
        is_copy: bool,
    ) -> Damage | None:
        """Look at a step. All ranks meet at one step in ten.

        Args:
            before: Counters of the step before.
            now: Its counters.
            loss: See `SpikeDetector.observe`.
            gradient_norm: Likewise.
            is_copy: Likewise.

        Returns:
            What is not to be trusted, where the segment ended here.
        """
        self._detector.observe(now.step, loss, gradient_norm, is_copy=is_copy)
        if before.step // READ_EVERY == now.step // READ_EVERY:
            return None
        return self.read(now)

    def read(self, now: Progress) -> Damage | None:
        """Judge what was not read yet, as `judge` does at one step in ten. All ranks meet."""
        onset = self._detector.read(now.step)
        if onset is None:
            return None
        after = onset.step - self._num_distrusted()
        # at each read while it lasts: what was taken since the last one is of a model in the middle of it
        num_lost = self._window.drop_after(after)
        self._breaks.at_spike(now, onset, num_lost)
        return Damage(after, onset.told)

    def trusted_until(self, now: Progress) -> int:
        """The last step that no spike can take back any more."""
        return now.step - _TOLD_WITHIN - self._num_distrusted()

    def mark_change(self) -> None:
        """What the loss was says nothing of what it will be."""
        self._detector.mark_change()

    def meet(self) -> None:
        """Bring what all ranks have not read yet together, so that `state_dict` gives the same on each. Collective."""
        self._detector.fetch()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to see the same spikes; what ranks did not `meet` for is that of this rank."""
        return self._detector.state_dict(meet=False)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was; an empty one is that of a run which watched no losses."""
        if state:
            self._detector.load_state_dict(state)

    def _num_distrusted(self) -> int:
        if self._distrust is not None:
            return self._distrust
        held = self._window.snapshots
        span = held[-1].progress.step - held[0].progress.step if held else 0
        return max(_DISTRUSTED, math.ceil(_SHARE_DISTRUSTED * span))
