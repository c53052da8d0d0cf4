"""The window's book-keeping: slots never collide, the oldest leaves first, a break makes a suffix valid."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress
from pretrain_merge.window.window import Break, Window

events = st.lists(st.sampled_from(["snapshot", "snapshot", "snapshot", "break", "clear"]), max_size=60)


def play(size, history):
    """A window after a history of events, and what a plain list says it should hold: (step, segment)."""
    window, expected, segment = Window(size), [], 0
    for step, event in enumerate(history, start=1):
        if event == "snapshot":
            window.add(Progress(step), lr=(float(step),), phase=f"phase {segment}")
            expected = [*expected, (step, segment)][-size:]
        elif event == "break":
            window.break_at(Progress(step), "reason")
            segment += 1
        else:
            window.clear()
            expected = []
    return window, expected, segment


@given(st.integers(2, 6), events)
def test_the_newest_snapshots_are_held_oldest_first(size, history):
    window, expected, _ = play(size, history)
    assert [(item.progress.step, item.segment) for item in window.snapshots] == expected
    assert window.newest == (window.snapshots[-1] if expected else None)
    assert window.before_newest == (window.snapshots[-2] if len(expected) > 1 else None)


@given(st.integers(2, 6), events)
def test_slots_never_collide_and_never_leave_the_store(size, history):
    window, _, _ = play(size, history)
    slots = [item.slot for item in window.snapshots]
    assert len(set(slots)) == len(slots)
    assert set(slots) <= set(range(size))


@given(st.integers(2, 6), events)
def test_the_next_slot_is_free_or_the_oldest_snapshots(size, history):
    window, _, _ = play(size, history)
    held = [item.slot for item in window.snapshots]
    assert window.next_slot() == held[0] if len(held) == size else window.next_slot() not in held


@given(st.integers(2, 6), events)
def test_what_came_before_the_last_break_is_never_valid(size, history):
    window, expected, segment = play(size, history)
    valid = [item.progress.step for item in window.valid]
    assert valid == [step for step, its_segment in expected if its_segment == segment]
    assert valid == [step for step, _ in expected][len(expected) - len(valid) :]  # a suffix
    assert window.num_valid == len(valid)


class Ends(deque):
    """Snapshots that may be looked at singly, and never be gone through."""

    def __iter__(self):
        raise AssertionError("went through all snapshots")


def test_a_step_of_a_run_looks_at_single_snapshots_only():
    merger, model = RollingMerger(window=5, every=1, merge_every=2), nn.Linear(1, 1)
    window = merger.window
    window._held = Ends()
    for step in range(1, 12):
        merger.observe(model, step)
        assert merger.merge_is_due() == (step % 2 == 0)
    assert window.num_valid == 5
    assert window.break_at(12, "reason") == 5


def test_a_break_says_how_many_snapshots_it_cost_and_is_remembered():
    window = Window(4)
    for step in (10, 20, 30):
        window.add(Progress(step))
    assert window.break_at(Progress(35), "learning rate") == 3
    assert window.break_at(Progress(36), "phase") == 0
    assert window.last_break == Break(Progress(36), "phase")
    window.clear()
    assert window.last_break == Break(Progress(36), "phase")


def test_a_snapshot_carries_what_was_known_when_it_was_taken():
    window = Window(2)
    taken = window.add(Progress(7, 70, 700), lr=(0.1, 0.2), phase="long")
    assert window.newest is taken
    assert (taken.progress, taken.lr, taken.phase) == (Progress(7, 70, 700), (0.1, 0.2), "long")


def test_a_snapshot_after_a_drop_goes_where_nothing_is_held() -> None:
    window = Window(3)
    for step in (10, 20, 30, 40):
        window.add(Progress(step))
    assert window.drop_after(25) == 2
    for step in (50, 60, 70):
        slot = window.next_slot()
        assert slot not in [item.slot for item in window.snapshots[-2:]]
        assert window.add(Progress(step)).slot == slot
        assert len({item.slot for item in window.snapshots}) == len(window.snapshots)
    assert [item.progress.step for item in window.snapshots] == [50, 60, 70]
    assert window.num_valid == 3


def test_a_drop_counts_the_valid_ones_among_what_it_drops() -> None:
    window = Window(4)
    window.add(Progress(10))
    window.add(Progress(20))
    window.break_at(Progress(25), "phase")
    window.add(Progress(30))
    assert window.drop_after(15) == 1
    assert [item.progress.step for item in window.snapshots] == [10]
    assert window.num_valid == 0
