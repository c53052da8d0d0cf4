"""Which snapshots are held, and which of them may be merged with each other. Integers only.

This module knows steps, slots and breaks. It knows no tensors, no stores and no coefficients. A break ends a segment;
only the snapshots of the current segment are valid for a merge, older ones wait to be overwritten.
"""

from collections import deque
from dataclasses import dataclass

from pretrain_merge.cadence import Progress

_BEGIN = Progress()


@dataclass(frozen=True)
class Snapshot:
    """What is known of one snapshot besides its tensors.

    Attributes:
        slot: Where the store keeps it.
        segment: Number of breaks before it; snapshots of different segments are never merged.
        progress: Counters when it was taken.
        lr: Learning rate that the last step before it used, per parameter group.
        phase: Name given to the last `mark_phase`, or empty.
    """

    slot: int
    segment: int
    progress: Progress
    lr: tuple[float, ...] = ()
    phase: str = ""


@dataclass(frozen=True)
class Break:
    """Why the segment before ended, and where."""

    progress: Progress
    reason: str

    @property
    def step(self) -> int:
        """Step at which it ended."""
        return self.progress.step


class Window:
    """The newest snapshots, oldest first, at most `size` of them.

    What a step asks for costs the same however many are held.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.segment = 0
        self.last_break: Break | None = None
        self.num_valid = 0  # snapshots since the last break
        # where the current segment began: at the last break, or with the run; kept, since every step asks for it
        self.since = _BEGIN
        self._held: deque[Snapshot] = deque()  # in the slots 0, 1, … as far as they were filled
        self._spare: list[int] = []  # slots among these whose snapshots were dropped

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """All that are held, oldest first."""
        return tuple(self._held)

    @property
    def valid(self) -> tuple[Snapshot, ...]:
        """Snapshots since the last break, oldest first."""
        return tuple(self._held)[len(self._held) - self.num_valid :]

    @property
    def newest(self) -> Snapshot | None:
        """The last snapshot taken, valid or not."""
        return self._held[-1] if self._held else None

    @property
    def before_newest(self) -> Snapshot | None:
        """The snapshot taken before the last one, valid or not."""
        return self._held[-2] if len(self._held) > 1 else None

    def next_slot(self) -> int:
        """The slot that the next snapshot goes to: a free one, else the oldest snapshot's."""
        if self._spare:
            return self._spare[-1]
        return self._held[0].slot if len(self._held) == self.size else len(self._held)

    def add(
        self, progress: Progress, *, lr: tuple[float, ...] = (), phase: str = "", segment: int | None = None
    ) -> Snapshot:
        """Enter the snapshot that was written to `next_slot`; the oldest one leaves where the window is full.

        Args:
            progress: Counters when it was taken.
            lr: Learning rate that the last step before it used, per parameter group.
            phase: Name given to the last `mark_phase`.
            segment: Of a snapshot that was taken before the last break; None: the current one.
        """
        snapshot = Snapshot(self.next_slot(), self.segment if segment is None else segment, progress, lr, phase)
        if len(self._held) == self.size:
            self.num_valid -= self._held.popleft().segment == self.segment
        if self._spare:
            self._spare.pop()  # it is the one that `next_slot` named
        self._held.append(snapshot)
        self.num_valid += snapshot.segment == self.segment
        return snapshot

    def break_at(self, progress: Progress, reason: str) -> int:
        """End the segment before this step; returns how many snapshots are no longer valid."""
        num_lost, self.num_valid = self.num_valid, 0
        self.segment += 1
        self.last_break, self.since = Break(progress, reason), progress
        return num_lost

    def drop_after(self, step: int) -> int:
        """Forget the snapshots of later steps, damaged as they may be; returns how many of them were valid."""
        num_valid = self.num_valid
        while self._held and self._held[-1].progress.step > step:
            snapshot = self._held.pop()
            self._spare.append(snapshot.slot)
            self.num_valid -= snapshot.segment == self.segment
        return num_valid - self.num_valid

    def resume_from(self, segment: int, last_break: Break | None) -> None:
        """Breaks of the run before; snapshots are entered afterwards."""
        self.segment, self.last_break = segment, last_break
        self.since = last_break.progress if last_break else _BEGIN

    def clear(self) -> None:
        """Forget all snapshots; breaks are remembered."""
        self._held.clear()
        self._spare.clear()
        self.num_valid = 0
