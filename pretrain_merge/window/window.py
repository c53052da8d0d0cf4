"""Which snapshots are held, and which of them may be merged with each other. Integers only.

This module knows steps, slots and breaks. It knows no tensors, no stores and no coefficients. A break ends a segment;
only the snapshots of the current segment are valid for a merge, older ones wait to be overwritten.
"""

from dataclasses import dataclass

from pretrain_merge.cadence import Progress


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
    """Why the segment before ended, and at which step."""

    step: int
    reason: str


class Window:
    """The newest snapshots, oldest first, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.snapshots: tuple[Snapshot, ...] = ()
        self.segment = 0
        self.last_break: Break | None = None

    @property
    def valid(self) -> tuple[Snapshot, ...]:
        """Snapshots since the last break, oldest first."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.segment == self.segment)

    @property
    def newest(self) -> Snapshot | None:
        """The last snapshot taken, valid or not."""
        return self.snapshots[-1] if self.snapshots else None

    def next_slot(self) -> int:
        """The slot that the next snapshot goes to: a free one, else the oldest snapshot's."""
        if len(self.snapshots) == self.size:
            return self.snapshots[0].slot
        return min(set(range(self.size)) - {snapshot.slot for snapshot in self.snapshots})

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
        kept = self.snapshots[1:] if len(self.snapshots) == self.size else self.snapshots
        self.snapshots = (*kept, snapshot)
        return snapshot

    def break_at(self, step: int, reason: str) -> int:
        """End the segment before this step; returns how many snapshots are no longer valid."""
        num_lost = len(self.valid)
        self.segment += 1
        self.last_break = Break(step, reason)
        return num_lost

    def resume_from(self, segment: int, last_break: Break | None) -> None:
        """Breaks of the run before; snapshots are entered afterwards."""
        self.segment, self.last_break = segment, last_break

    def clear(self) -> None:
        """Forget all snapshots; breaks are remembered."""
        self.snapshots = ()
