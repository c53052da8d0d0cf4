"""What a sweep evaluates, decided before a tensor is read: at which steps, and which checkpoints in which merge.

This module knows steps, rates, views and coefficients. It replays over saved checkpoints what the callback does over
snapshots, with the same window, so that records of both say the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain_merge import coefficients
from pretrain_merge.cadence import Progress
from pretrain_merge.config import View, WindowConfig, WindowSettings
from pretrain_merge.errors import CoefficientError, ConfigError
from pretrain_merge.offline.tensors import Source
from pretrain_merge.records import Recipe
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.window import Window

_SMALLEST = 2  # checkpoints of a view that takes all there are


@dataclass(frozen=True)
class SweptView:
    """A named merge of every so-many-th checkpoint, back from the newest.

    Attributes:
        name: In records.
        view: Kind of coefficients, and of how many checkpoints.
        interval: 1: of each; 2: of every second one.
    """

    name: str
    view: View
    interval: int = 1


@dataclass(frozen=True)
class Point:
    """One merge point.

    Attributes:
        newest: Index of the checkpoint that it is at.
        since: Step of the last break; 0: none.
        valid: Indices of all checkpoints that may be merged with the newest, oldest first.
        merges: By view, the indices of its checkpoints and what the record says of it.
        skipped: By view, why it is not made here.
    """

    newest: int
    since: int
    valid: tuple[int, ...]
    merges: Mapping[str, tuple[tuple[int, ...], Recipe]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_evaluations(self) -> int:
        """Of raw and of every view."""
        return 1 + len(self.merges)


def swept_views(views: Sequence[View], intervals: Sequence[int], window: int) -> tuple[SweptView, ...]:
    """Every view over each checkpoint; those of a fixed number also at wider intervals, as far as the window reaches.

    Raises:
        ConfigError: An interval is not one.
    """
    if not intervals or not all(type(number) is int and number >= 1 for number in intervals):
        raise ConfigError(f"intervals: {list(intervals)} are not intervals. Allowed: whole numbers from 1 on: [1, 2].")
    found = []
    for interval in dict.fromkeys(intervals):
        for view in views:
            if interval == 1:
                found.append(SweptView(view.name, view))
            elif view.last is not None and (view.last - 1) * interval < window:
                found.append(SweptView(f"{view.name}-every{interval}", view, interval))
    if not found:
        raise ConfigError(
            f"intervals: {list(intervals)} leave no view, since none of a fixed number fits the window of {window}. "
            f"Include 1, or raise window."
        )
    return tuple(found)


def nested_views(window: int) -> list[str]:
    """Plain means of 2, 4, 8, … checkpoints, and both a plain mean and the weights of a decay over the whole window."""
    doubled = [2**power for power in range(1, window.bit_length()) if 2**power < window]
    return [*(f"sma{number}" for number in doubled), "sma", "wsm"]


def merge_points(sources: Sequence[Source], views: Sequence[SweptView], settings: WindowSettings) -> list[Point]:
    """Every merge point of a run that left these checkpoints, oldest first.

    Args:
        sources: With a step each, in their order.
        views: What is merged.
        settings: Window, cadences and breaks, as of a callback.

    Raises:
        ConfigError: There is none.
    """
    window, points, notices = Window(settings.config.window), [], WarnOnce()
    index_of: dict[int, int] = {}
    before = Progress()
    for index, (source, reason) in enumerate(zip(sources, _breaks(sources, settings.config), strict=True)):
        now = Progress(source.step or 0)
        if reason and (num_lost := window.break_at(now, reason)):
            notices.warn(
                "lr", f"step {now.step}: {reason}; {num_lost} checkpoints before are merged with no later one."
            )
        if settings.cadence.crossed(before, now, since=window.since):
            last = window.newest
            window.add(now)
            index_of[now.step] = index
            is_due = last is not None and settings.merge_cadence.crossed(last.progress, now, since=window.since)
            if is_due and window.num_valid >= _SMALLEST:
                points.append(_point(window, index_of, views))
        before = now
    if not any(point.merges for point in points):
        raise ConfigError(_why_nothing(sources, window, points, len(index_of)))
    return points


def _breaks(sources: Sequence[Source], config: WindowConfig) -> Iterator[str]:
    """Of each checkpoint, why it may not be merged with the one before; empty: it may.

    The rate in a checkpoint is that of the step to come (P28). Where it is lower than in the checkpoint before, the
    last step may still have used the higher one, whose noise would be in every merge: it is merged with neither side.
    Where it rose, as in a warm-up, the last step used less at worst, and the checkpoint begins what follows.
    """
    reference: tuple[float, ...] = ()
    fell = False
    for source in sources:
        differs = bool(reference and source.lr) and not _are_close(source.lr, reference, config.lr_tolerance)
        is_break = config.breaks.lr and (differs or fell)
        yield f"the learning rate changed before step {source.step}" if is_break else ""
        fell = differs and any(rate < other for rate, other in zip(source.lr, reference, strict=False))
        reference = source.lr if differs or not reference else reference


def _are_close(rates: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return len(rates) == len(others) and all(
        math.isclose(rate, other, rel_tol=tolerance) for rate, other in zip(rates, others, strict=True)
    )


def _point(window: Window, index_of: Mapping[int, int], views: Sequence[SweptView]) -> Point:
    valid = window.valid
    merges: dict[str, tuple[tuple[int, ...], Recipe]] = {}
    skipped: dict[str, str] = {}
    for swept in views:
        view, needed = swept.view, swept.view.last or _SMALLEST
        chosen = valid[:: -swept.interval][: view.last][::-1]
        if len(chosen) < needed:
            since = f" since the break at step {window.last_break.step}" if window.last_break else ""
            reach = (needed - 1) * swept.interval + 1
            skipped[swept.name] = f"it reaches back over {reach} checkpoints, and there are {len(valid)}{since}."
            continue
        steps = tuple(item.progress.step for item in chosen)
        try:
            weights = coefficients.compute(view.kind, len(chosen), times=steps, **view.params)
        except CoefficientError as error:  # a kind that asks for even spacing, say
            skipped[swept.name] = str(error)
            continue
        merges[swept.name] = tuple(index_of[step] for step in steps), Recipe(steps, weights)
    indices = tuple(index_of[item.progress.step] for item in valid)
    return Point(indices[-1], window.since.step, indices, merges, skipped)


def _why_nothing(sources: Sequence[Source], window: Window, points: Sequence[Point], num_taken: int) -> str:
    reasons = [reason for point in points for reason in point.skipped.values()]
    if num_taken < _SMALLEST:
        why = f"only {num_taken} of them are taken by every, start and their steps. Name more, or change these."
    elif window.last_break and not points:
        rates = ", ".join(f"{max(source.lr):g} at step {source.step}" for source in sources[:4] if source.lr)
        why = (
            f"{window.last_break.reason}, and no two checkpoints in a row are of one rate ({rates}, …). Merges are "
            f"made where the rate is constant; set breaks: {{lr: false}} to merge across its changes."
        )
    elif reasons:
        why = f"no view can be made: {reasons[-1]} Choose smaller views."
    else:
        why = "merge_every is longer than their steps. Choose a smaller one."
    return f"sources: nothing to merge in {len(sources)} checkpoints: {why}"
