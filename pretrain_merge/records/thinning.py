"""A few of many records: what a picture or a table shows of a run of any length.

This module knows lists. It chooses records whole, so that all curves of a picture have their points at the same steps.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from pretrain_merge.records.record import MergeRecord

_T = TypeVar("_T")


class History:
    """Records of a run as it goes on, at most so many: evenly spread over it, with the newest.

    Recipes and reasons are left out, which may be long. Adding one costs the same at any time.

    Args:
        at_most: How many are held, an even number of at least 2.
    """

    def __init__(self, at_most: int = 512) -> None:
        self._at_most = at_most
        self._kept: list[MergeRecord] = []
        self._newest: MergeRecord | None = None
        self._stride = 1  # every how many are kept; doubled whenever there is no room
        self._number = 0

    def append(self, record: MergeRecord) -> None:
        """Add the next one."""
        self._newest = replace(record, recipes={}, skipped={}, timing={})
        if self._number % self._stride == 0:
            if len(self._kept) == self._at_most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            if self._number % self._stride == 0:
                self._kept.append(self._newest)
        self._number += 1

    @property
    def records(self) -> list[MergeRecord]:
        """Oldest first."""
        newest = [self._newest] if self._newest is not None and self._newest is not self._kept[-1] else []
        return self._kept + newest


def evenly(number: int, at_most: int) -> set[int]:
    """Places, at most so many of 0 to `number` - 1, the first and the last among them.

    >>> sorted(evenly(100, 3)), sorted(evenly(2, 3))
    ([0, 50, 99], [0, 1])
    """
    if number <= at_most:
        return set(range(number))
    return {round(index * (number - 1) / (at_most - 1)) for index in range(at_most)}


def with_extremes(records: Sequence[_T], at_most: int, value: Callable[[_T], float]) -> list[_T]:
    """Records for a curve: of each stretch the smallest and the largest value, so that no spike is lost.

    Args:
        records: Oldest first.
        at_most: How many, at least 4; the first and the last are among them.
        value: What the curve shows of a record; NaN is kept only where a stretch has nothing else.
    """
    if len(records) <= at_most:
        return list(records)
    places = {0, len(records) - 1}
    edges = [index * len(records) // ((at_most - 2) // 2) for index in range((at_most - 2) // 2 + 1)]
    for start, stop in itertools.pairwise(edges):
        values = {index: value(records[index]) for index in range(start, stop)}
        numbers = [index for index in values if not math.isnan(values[index])] or [start]
        places |= {min(numbers, key=values.__getitem__), max(numbers, key=values.__getitem__)}
    return [records[place] for place in sorted(places)]
