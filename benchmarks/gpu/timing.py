"""Candidates in turns, each beside the yardstick: a slow spell of a device that others share hits both alike."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.setting import Setting

Action = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Medians over rounds.

    Attributes:
        seconds: From the call until the device is done, which is what a run waits for.
        ratio: The same in units of the yardstick.
    """

    seconds: float
    ratio: float


def interleave(setting: Setting, candidates: Mapping[str, Action], yardstick: Action) -> dict[str, Timing]:
    """Time all candidates in rounds, the yardstick before each; the first round, which compiles, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(1 + setting.sized(9, 1)):
        for name, action in candidates.items():
            unit = setting.seconds(yardstick)
            own = setting.seconds(action)
            if number:
                seconds[name].append(own)
                ratios[name].append(own / unit)
    return {name: Timing(statistics.median(seconds[name]), statistics.median(ratios[name])) for name in candidates}
