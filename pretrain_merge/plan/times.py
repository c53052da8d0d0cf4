"""What each operation of merging moves on one rank, and how long that takes.

This module knows how many streams an operation reads and writes, and through what. It knows no training and no shares
of anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain_merge.plan.hardware import Hardware
from pretrain_merge.plan.inputs import Merging
from pretrain_merge.stores.budget import HOST_SHARE


@dataclass(frozen=True)
class Move:
    """So much of something, at so much per second.

    Attributes:
        amount: Bytes read and written, elements checked or rounded, or tokens evaluated.
        rate: The same per second.
        through: "memory", "link", "page cache" or "disk" for bytes; "checks" or "rounding" for elements; "model" for
            tokens.
    """

    amount: int
    rate: float
    through: str

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.amount / self.rate


@dataclass(frozen=True)
class Operations:
    """One rank's operations on its window.

    Attributes:
        elements: Parameters on the rank.
        merging: The callback's configuration.
        hardware: What moves the bytes.
        store: Where slots lie.
        sharing: Ranks on one host.
    """

    elements: int
    merging: Merging
    hardware: Hardware
    store: str
    sharing: int

    def capture(self) -> tuple[Move, ...]:
        """The finite check reads once; a block's mean is made in place; then the copy, where that holds up the run."""
        merging = self.merging
        source = merging.accumulator_itemsize if merging.in_blocks else merging.itemsize
        moves = [self._in_memory(source), *self._worked("checks", self.hardware.check_rate)]
        if merging.in_blocks:
            moves.append(self._summed(read=source, written=source))
        if self.store == "disk":
            moves.append(Move(self._slot_bytes, self.hardware.file_rate, "page cache"))
        # a copy on a side stream holds up nothing
        elif not self._is_beside():
            moves.append(self._in_memory(source + merging.slot_itemsize))
            if merging.slot_itemsize < source:
                moves += self._worked("rounding", self.hardware.rounding_rate)
        return _added_up(moves)

    def after_capture(self) -> tuple[Move, ...]:
        """What goes on beside the next steps: the copy on a side stream, or what the disk still writes."""
        if self.store == "disk":
            return (self._from_disk(1),)
        return (self._over_link(1),) if self._is_beside() else ()

    def sample(self) -> tuple[Move, ...]:
        """A model added to the open block: the sum is read and written, the model read."""
        total = self.merging.accumulator_itemsize
        return (self._summed(read=total + self.merging.itemsize, written=total),)

    def merge(self) -> tuple[Move, ...]:
        """All views, before them the spread of the whole window where the first view sees less of it, and raw back."""
        views = list(self.merging.views)
        if views[0] < self.merging.window:
            views.insert(0, self.merging.window)
        merging = self.merging
        within = self._in_memory(merging.slot_itemsize + merging.itemsize)
        # aside and back; the pages that a CPU's copy gets for this evaluation are zeroed first
        through_scratch = self._in_memory((4 if self.hardware.link_rate else 5) * merging.itemsize)
        raw = through_scratch if merging.has_scratch else self._from_elsewhere(1) or within
        return _added_up([*map(self._merged, views), raw])

    def _merged(self, number: int) -> Move:
        """So many slots are read, and the live parameters written."""
        read = number * self.merging.slot_itemsize
        return self._from_elsewhere(number) or self._summed(read=read, written=self.merging.itemsize)

    def _from_elsewhere(self, number: int) -> Move | None:
        """What takes longest where slots are not in the memory that computes."""
        if self.store == "disk" and not self._is_cached():
            return self._from_disk(number)
        if self.store != "device" and self.hardware.link_rate:
            return self._over_link(number)  # what the device then reads and writes itself goes on meanwhile
        return None

    def _summed(self, *, read: int, written: int) -> Move:
        """A pass of the merge kernel, of so many bytes per element.

        An ordinary store on a CPU fetches the line that it overwrites and later writes it back; a copy's rate counts
        both as one. The kernel's own stores go past the cache and spare the first.
        """
        return self._in_memory(read + (written if self.hardware.link_rate else written // 2))

    def _worked(self, what: str, rate: float | None) -> tuple[Move, ...]:
        """Arithmetic on top of moving bytes: a core hides only part of it behind its waiting for them."""
        return (Move(self.elements, rate, what),) if rate is not None else ()

    def _is_beside(self) -> bool:
        return self.store == "host" and self.hardware.link_rate is not None

    def _is_cached(self) -> bool:
        """Whether host memory keeps the slot files; a device reads them too slowly from there to count on it."""
        # one more than the window: a new file is written beside the one that it replaces
        files = self.sharing * (self.merging.window + 1) * self._slot_bytes
        # of the page cache no more is counted on than `store: auto` takes of host memory
        return self.hardware.link_rate is None and files <= HOST_SHARE * self.hardware.host_bytes

    def _in_memory(self, bytes_per_element: int) -> Move:
        return Move(self.elements * bytes_per_element, self.hardware.memory_rate, "memory")

    def _over_link(self, num_slots: int) -> Move:
        assert self.hardware.link_rate is not None
        return Move(num_slots * self._slot_bytes, self.hardware.link_rate, "link")

    def _from_disk(self, num_slots: int) -> Move:
        return Move(
            # the ranks of a host write to one disk
            num_slots * self._slot_bytes,
            self.hardware.disk_rate / self.sharing,
            "disk",
        )

    @property
    def _slot_bytes(self) -> int:
        return self.elements * self.merging.slot_itemsize


def _added_up(moves: Iterable[Move]) -> tuple[Move, ...]:
    """One move for each way through, in the order of the first."""
    totals: dict[tuple[float, str], int] = {}
    for move in moves:
        key = (move.rate, move.through)
        totals[key] = totals.get(key, 0) + move.amount
    return tuple(Move(amount, rate, through) for (rate, through), amount in totals.items())
