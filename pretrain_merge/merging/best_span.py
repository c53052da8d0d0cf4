"""Over which span a mean is best, and how far to go beyond it, from the losses of a few: at once or by and by.

This module knows spans and losses. It knows no snapshots, no records and no run.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

# Four merge points lead to twice the span: half of that follows too slowly to reach a tenth of a run from 6% in its
# first third, and twice of that follows the noise of single evaluations.
_PACE = 2.0**0.25
_ROUNDED = 1.5  # by how much whole intervals change a span at most: one is the nearest to all below the root of two
NOTCH = 0.1  # of an extrapolation, in distances between its means
_FURTHEST = 0.3  # half a distance did harm wherever it was tried
# Relative loss per squared log of the span: what is known of other runs counts a fifth of the bend that losses have
# there (.005). Without it the noise of one evaluation chooses, since the loss is flat around its best.
_KNOWN_BEND = 0.001
_SHARES = (0.125, 0.25, 0.5, 1.0)  # of the window: halved three times, as the loss is smooth in the log of the span


class BestSpan(NamedTuple):
    """Where the loss of a plain mean is smallest, as far as nested means tell.

    Attributes:
        span: In the unit of the spans that were given.
        loss: What the mean over it is expected to have.
    """

    span: float
    loss: float


def followed(share: float, used: float, *, is_better_longer: bool, at_most: float) -> float:
    """The next share of a run to span: a little longer or shorter, by which of two means was better.

    Args:
        share: The one before.
        used: What the longer mean really spanned, which whole intervals and the window bound.
        is_better_longer: Whether the longer mean had the smaller loss.
        at_most: The largest share.

    >>> followed(0.06, 0.06, is_better_longer=True, at_most=0.12) / 0.06 == 2**0.25
    True
    """
    # what a full window cannot follow must not run ahead of it, or it would take as long to come back
    near = min(max(share, used / _ROUNDED), used * _ROUNDED)
    return min(near * _PACE if is_better_longer else near / _PACE, at_most)


def stepped(step: float, *, is_better_further: bool) -> float:
    """The next step of an extrapolation: one notch further or back, 0 at least and .3 at most.

    The loss along a line is convex near its minimum: where it still falls one notch further, it has fallen up to here,
    and where it rises the minimum lies behind. So two merge points that disagree end where they began.

    Args:
        step: The one before.
        is_better_further: Whether the model one `NOTCH` further had the smaller loss.

    >>> stepped(0.0, is_better_further=True), stepped(0.0, is_better_further=False)
    (0.1, 0.0)
    """
    # rounded: a sum of tenths would not be the same number after a way there and back
    return min(max(round(step + (NOTCH if is_better_further else -NOTCH), 1), 0.0), _FURTHEST)


def nested(window: int, average: str) -> list[int]:
    """How many snapshots the means must hold that `best_span` reads: over a window, a half, a quarter, an eighth.

    Args:
        window: Snapshots that are kept.
        average: "last" or "block".

    >>> nested(10, "last"), nested(3, "last")
    ([2, 3, 5, 10], [2, 3])
    """
    more = int(average == "last")  # n snapshots span n - 1 intervals, n block means span n
    return sorted({max(2, round((window - more) * share) + more) for share in _SHARES})


def best_span(losses: Mapping[float, float], *, usual: float | None = None) -> BestSpan | None:
    """The minimum of the parabola, in the logarithm of the span, through the best mean and its two neighbours.

    Through three and not a fit of all: the loss rises like a square of the span where it is too wide and slowly where
    it is too narrow, so that means far off would bend the parabola. Where the shortest or the longest mean is the best
    one, it is the answer: nothing was measured beyond.

    Args:
        losses: Loss of the plain mean by span; spans above 0. What is not finite is left out.
        usual: The span that is best in other runs, towards which the answer leans; None: it does not.

    Returns:
        None where there is no loss at all.

    >>> round(best_span({1.0: 2.5, 2.0: 2.0, 4.0: 2.5, 8.0: 4.0}).span, 9)
    2.0
    """
    measured = sorted((math.log(span), loss) for span, loss in losses.items() if span > 0 and math.isfinite(loss))
    if not measured:
        return None
    known_bend = 0.0 if usual is None else _KNOWN_BEND * abs(min(loss for _, loss in measured))
    middle = math.log(usual or 1.0)
    known = [(at, loss + known_bend * (at - middle) ** 2) for at, loss in measured]
    lowest = min(range(len(known)), key=lambda index: known[index][1])
    at, loss = known[lowest]
    if not 0 < lowest < len(known) - 1:
        return BestSpan(math.exp(at), measured[lowest][1])
    (before, higher), (after, highest) = known[lowest - 1], known[lowest + 1]
    # slopes of the two chords; both are steeper than level by the choice of `lowest`, so the parabola opens upwards
    down, up = (loss - higher) / (at - before), (highest - loss) / (after - at)
    bend = (up - down) / (after - before)
    if not bend > 0.0:  # a plateau: all three are equal
        return BestSpan(math.exp(at), measured[lowest][1])
    vertex = (before + at) / 2.0 - down / (2.0 * bend)
    return BestSpan(math.exp(vertex), loss - bend * (at - vertex) ** 2 - known_bend * (vertex - middle) ** 2)
