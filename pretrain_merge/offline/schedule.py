"""What a sweep evaluates, decided before a tensor is read: at which steps, and which checkpoints in which merge.

This module knows steps, rates, views and coefficients. It replays over saved checkpoints what the callback does over
snapshots, with the same window, so that records of both say the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pretrain_merge import coefficients
from pretrain_merge.cadence import Progress
from pretrain_merge.config import View, WindowConfig, WindowSettings
from pretrain_merge.errors import CoefficientError, ConfigError, WindowNotReadyError
from pretrain_merge.merging.views import Views
from pretrain_merge.offline.tensors import Source
from pretrain_merge.records import Recipe
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.window import Window

LATEST = 2**53  # steps; beyond, floats skip integers
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
        why_since: What that break was, or empty.
        valid: Indices of all checkpoints that may be merged with the newest, oldest first.
        merges: By view, the indices of its checkpoints and what the record says of it.
        skipped: By view, why it is not made here.
    """

    newest: int
    since: int
    why_since: str
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
    # one interval named twice is one
    for interval in dict.fromkeys(intervals):
        for view in views:
            if interval == 1:
                found.append(SweptView(view.name, view))
            # a view of all there are would be another one at each interval, and reach as far
            elif view.last is not None and (view.last - 1) * interval < window:
                found.append(SweptView(f"{view.name}-every{interval}", view, interval))
    if not found:
        raise ConfigError(
            f"intervals: {list(intervals)} leave no view, since none of a fixed number fits the window of {window}. "
            f"Include 1, or raise window."
        )
    return tuple(found)


def nested_views(window: int) -> list[str]:
    """Plain means of 2, 4, 8, … checkpoints and of the whole window; and what the callback makes of it on its own."""
    doubled = [2**power for power in range(1, window.bit_length()) if 2**power < window]
    return [*(f"sma{number}" for number in (*doubled, window)), "sma", "wsm"]


def in_order(sources: Sequence[Source], steps: Sequence[int] | None) -> tuple[Source, ...]:
    """Checkpoints by their steps, of which each needs one of its own.

    Raises:
        ConfigError: One has none, or two have the same.
    """
    if steps is not None:
        if len(steps) != len(sources):
            raise ConfigError(f"steps: {len(steps)} were given for {len(sources)} checkpoints. Give one for each.")
        sources = [replace(source, step=step) for source, step in zip(sources, steps, strict=True)]
    for source in sources:
        if source.step is None or not 0 <= source.step < LATEST:
            raise ConfigError(
                f"steps: {source.place} is of step {source.step}, as far as it says. Each checkpoint needs one from 0 "
                f"on, since records are by step: name them with steps, or put it into the file's name (step=1000)."
            )
    ordered = sorted(sources, key=lambda source: source.step or 0)
    for first, second in pairwise(ordered):
        if first.step == second.step:
            raise ConfigError(
                f"steps: {first.place} and {second.place} are both of step {first.step}. Leave one of them out, or say "
                f"with steps which is which."
            )
    return tuple(ordered)


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
    callbacks = Views(settings.views, settings.cadence)
    index_of: dict[int, int] = {}
    before = Progress()
    for index, (source, reason) in enumerate(zip(sources, _breaks(sources, settings.config), strict=True)):
        now = Progress(source.step or 0)
        # a break before anything was held loses nothing, and is not worth a word
        if reason and (num_lost := window.break_at(now, reason)):
            notices.warn(
                "lr", f"step {now.step}: {reason}; {num_lost} checkpoints before are merged with no later one."
            )
        if settings.cadence.crossed(before, now, since=window.since):
            last = window.newest
            window.add(now)
            index_of[now.step] = index
            # counted from the snapshot before, as a merge is due where one crosses a multiple
            is_due = last is not None and settings.merge_cadence.crossed(last.progress, now, since=window.since)
            if is_due and window.num_valid >= _SMALLEST:
                points.append(_point(window, index_of, views, callbacks))
        before = now
    # evaluating raw alone for hours would tell what the run's own log does
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


def _point(window: Window, index_of: Mapping[int, int], views: Sequence[SweptView], callbacks: Views) -> Point:
    merges: dict[str, tuple[tuple[int, ...], Recipe]] = {}
    skipped: dict[str, str] = {}
    now = window.valid[-1].progress
    for swept in views:
        try:
            recipe = callbacks.resolve(swept.name, window, now).recipe if swept.interval == 1 else _wider(swept, window)
        except (WindowNotReadyError, CoefficientError) as error:
            # early points have few checkpoints; the record says so, as that of a live run does
            skipped[swept.name] = str(error)
            continue
        merges[swept.name] = tuple(index_of[step] for step in recipe.steps), recipe
    indices = tuple(index_of[item.progress.step] for item in window.valid)
    why_since = window.last_break.reason if window.last_break else ""
    return Point(indices[-1], window.since.step, why_since, indices, merges, skipped)


def _wider(swept: SweptView, window: Window) -> Recipe:
    number = swept.view.last or _SMALLEST
    steps = tuple(item.progress.step for item in window.valid[:: -swept.interval][:number][::-1])
    if len(steps) < number:
        since = f" since the break at step {window.last_break.step}" if window.last_break else ""
        raise WindowNotReadyError(
            f"view {swept.name!r} reaches back over {(number - 1) * swept.interval + 1} checkpoints, and there are "
            f"{window.num_valid}{since}."
        )
    return Recipe(steps, coefficients.compute(swept.view.kind, number, times=steps, **swept.view.params))


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
