"""What ends a stretch of snapshots that may be merged: another rate, a phase, weights that are not finite.

This module knows rates, names and messages. It knows no tensors and no ranks.
"""

from collections.abc import Sequence

from pretrain_merge.cadence import Progress
from pretrain_merge.config import WindowConfig
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.spikes import Onset
from pretrain_merge.window.block_mean import BlockMean
from pretrain_merge.window.window import Window

_IN_A_ROW = 10  # a few falls are a schedule of steps, whose stretches may yet be long
_MOST_SAID = 10  # of changes after a stretch at a constant rate: a schedule of steps may make one in each epoch


class Breaks:
    """The breaks of one window, each said once and only where it costs snapshots.

    Args:
        window: Where segments are counted.
        block: Its open interval with `average: block`: a break inside it leaves it without a mean.
        settings: `breaks` and `lr_tolerance` of the configuration.
        notices: What the user was told already.

    Attributes:
        segment_lr: Learning rates that the current segment began with; later ones are compared with these, so that a
            slow drift adds up.
        phase: Name given to the last `mark_phase`, or empty.
        num_refused: Snapshots refused so far because they were not finite.
        num_spikes: Spikes of the training loss so far.
    """

    def __init__(self, window: Window, block: BlockMean | None, settings: WindowConfig, notices: WarnOnce) -> None:
        self._window = window
        self._block = block
        self._settings = settings
        self._notices = notices
        self.segment_lr: tuple[float, ...] = ()
        self._num_falls = 0  # breaks in a row by a rate that fell, without a merge between
        self._num_stretches = 0  # that were long enough to be merged, and that another rate ended
        self.phase = ""
        self.num_refused = self.num_spikes = 0

    def restore(self, segment_lr: tuple[float, ...], phase: str, num_refused: int, num_spikes: int) -> None:
        """Go on where another run was."""
        self.segment_lr, self.phase = segment_lr, phase
        self.num_refused, self.num_spikes = num_refused, num_spikes

    def at_new_lr(self, now: Progress, lr: tuple[float, ...]) -> None:
        """Break where the rates of this step are not those that the segment began with."""
        if self._settings.breaks.lr and _differs(lr, self.segment_lr, self._settings.lr_tolerance):
            if self.segment_lr:
                self._say_if_it_decays(now, lr)
                changed = f"learning rate changed from {_listed(self.segment_lr)} to {_listed(lr)}"
                # where the rate moves at every step this is said once; after a stretch at one rate it is news
                is_news = self._window.num_valid > 1 and self._num_stretches < _MOST_SAID
                self._num_stretches += is_news
                self.at(now, changed, said_as=f"lr {self._num_stretches}" if is_news else "lr")
            # also from the first rate that is known on, which ends nothing
            self.segment_lr = lr

    def _say_if_it_decays(self, now: Progress, lr: tuple[float, ...]) -> None:
        falls = max(lr, default=0.0) < max(self.segment_lr)
        self._num_falls = self._num_falls + 1 if falls and self._window.num_valid < 2 else 0  # else merges were made
        if self._num_falls == _IN_A_ROW:
            self._notices.warn(
                "decays",
                f"step {now.step}: the learning rate fell {_IN_A_ROW} times in a row without two snapshots between. "
                f"It decays, so nothing is merged. Set breaks: {{lr: off}} to merge across its changes, or merge where "
                f"the rate is constant.",
            )

    def at_phase(self, now: Progress, name: str) -> None:
        """Break because the user said that something changed."""
        self.phase = name
        self.at(now, f"phase {name!r}")

    def at_refused(self, now: Progress) -> None:
        """Break because the snapshot of this step is not finite, and count it."""
        self.num_refused += 1
        self.at(now, "a snapshot held NaN or infinity")
        self._notices.warn(
            "non-finite",
            f"step {now.step}: the snapshot holds NaN or infinity and was refused; so is every further one until the "
            f"weights are finite. Records count them as `refused`.",
        )

    def at_spike(self, now: Progress, onset: Onset, num_dropped: int) -> None:
        """Break because the training loss spiked: once per spike, and again while it lasts.

        Args:
            now: Counters when it was seen.
            onset: Where it began.
            num_dropped: Valid snapshots that are not even kept.
        """
        self.num_spikes += onset.is_new
        self.at(now, onset.told, num_dropped=num_dropped)

    def at(self, now: Progress, reason: str, *, said_as: str | None = None, num_dropped: int = 0) -> None:
        """Break for this reason; said once by itself, or by the name of its kind."""
        num_lost = self._window.break_at(now, reason) + num_dropped
        if self._block is not None:
            self._block.invalidate()
        if num_lost:
            lost = "1 snapshot is" if num_lost == 1 else f"{num_lost} snapshots are"
            self._notices.warn(
                # schedules break at every step: by its kind it is said once, by its text each time
                said_as or reason,
                f"break at step {now.step} ({reason}): {lost} no longer merged; the window refills.",
            )


def _listed(lr: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(lr))


def _differs(lr: Sequence[float], reference: Sequence[float], tolerance: float) -> bool:
    if len(lr) != len(reference):
        return True  # another number of groups is another optimizer
    # so that NaN differs from everything, itself included
    return any(not abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in zip(lr, reference, strict=True))
