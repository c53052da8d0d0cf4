"""Which merges are measured at a step: their snapshots and coefficients, the latter from the product's functions.

This module knows steps and numbers. It knows neither models nor losses.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.ablations.setups import BETWEEN, IN_DECAY, INTERVALS, NUMBERS, STAGES
from pretrain_merge import coefficients
from pretrain_merge.cadence import Share

SHARE = Share.parse("1%")
NESTED = (2, 3, 5, 7, 10, 12, 16, 23, 31, 42, 60, 90)  # newest n of snapshots 1% apart: spans of 1 to 59%
LIMIT = 0.12  # of the steps since the warm-up: what a view that limits itself spans at most
WINDOW = 10
ON_A_LINE = 21  # what an `extrapolated` view takes: two means over a tenth of the run each
FURTHER = {f"extrapolated {step:g}": step for step in (0.0, 0.1, 0.2, 0.3)}

# the paper's Figure 4, and the shapes of WSM and QAM beside it
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sma": ("sma", {}),
    "wma": ("wma", {}),
    "ema .2": ("ema", {"alpha": 0.2}),
    "ema .1": ("ema", {"alpha": 0.1}),
    "wsm 1-sqrt": ("decay", {"shape": "1-sqrt"}),
    "wsm cosine": ("decay", {"shape": "cosine"}),
    "wsm 1-square": ("decay", {"shape": "1-square"}),
    "qam": ("qam", {}),
}
HALF_LIFE = 0.05  # of the steps so far, as torchtitan fixes it
_PARTS_COMPARED = (4, 1)  # of a unit: at 8B and 32B all kinds are compared, and block means with single snapshots


class Merge(NamedTuple):
    """One merge of stored models.

    Attributes:
        kind: A key of `KINDS` or `FURTHER`, "block" for a plain mean of block means, "ema 5%" for `HALF_LIFE`, "raw".
        every: Interval in steps, 0 for "1%".
        asked: Snapshots of the view.
        used: Snapshots there were; fewer where the warm-up is nearer than the window is long.
        steps: Of the stored models, oldest first.
        weights: Their coefficients.
    """

    kind: str
    every: int
    asked: int
    used: int
    steps: tuple[int, ...]
    weights: tuple[float, ...]


class Plan:
    """Which merges are measured at which step of a run.

    Args:
        unit: Steps that stand for 32 billion tokens of the paper; a multiple of 8. The warm-up takes one.
    """

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._intervals = [unit // part for part in INTERVALS]
        self._compared = [unit // part for part in _PARTS_COMPARED]

    def constant(self) -> dict[int, list[Merge]]:
        """All merges at constant rate, by step."""
        plan: dict[int, list[Merge]] = {}
        for units in (*STAGES, *BETWEEN):
            step = units * self._unit
            _add(plan, step, self._fixed(step) + (self._paper(step) if units in STAGES else []))
            points = self._shared_points(step)
            nested = [_merge("sma", 0, number, points[-number:]) for number in NESTED if number <= len(points)]
            _add(plan, points[-1], [*nested, _growing(points[-max(NESTED) :]), *_further(points[-ON_A_LINE:])])
        for step, merges in self.decay().items():
            _add(plan, step, merges)
        return plan

    def decay(self) -> dict[int, list[Merge]]:
        """Merges whose snapshots lie in the decay or, in the run itself, in the same stretch; by step."""
        plan: dict[int, list[Merge]] = {}
        every = self._unit // 4
        for units in IN_DECAY:
            step = units * self._unit
            _add(plan, step, [self._single(kind, step, every, WINDOW) for kind in ("sma", "wma", "ema .2")])
        return plan

    def stored_steps(self) -> set[int]:
        """Every step whose model some merge needs."""
        return {step for merges in self.constant().values() for merge in merges for step in merge.steps}

    def _fixed(self, step: int) -> list[Merge]:
        """A window at a fixed interval, whole and limited to a share of the run."""
        numbers = {every: (WINDOW, self.limited(step, every)) for every in self._intervals}
        return [self._single("sma", step, every, number) for every, asked in numbers.items() for number in asked]

    def _paper(self, step: int) -> list[Merge]:
        """Figure 5: intervals and numbers; Figure 4: kinds; and block means beside single snapshots."""
        return [
            *(self._single("sma", step, every, number) for every in self._intervals for number in NUMBERS),
            *(self._single(kind, step, every, WINDOW) for kind in KINDS for every in self._compared),
            *(self._blocks(step, every) for every in self._compared),
        ]

    def _shared_points(self, step: int) -> list[int]:
        """Steps at which `every: "1%"` takes snapshots up to a step, counted from the end of the warm-up."""
        return [self._unit + SHARE.reached(index) for index in range(1, SHARE.index(step - self._unit) + 1)]

    def limited(self, step: int, every: int) -> int:
        """How many of the newest snapshots span at most the limit; two at least, the window at most."""
        return min(WINDOW, max(2, int(LIMIT * (step - self._unit)) // every + 1))

    def _single(self, kind: str, step: int, every: int, asked: int) -> Merge:
        used = min(asked, (step - self._unit) // every + 1)
        return _merge(kind, every, asked, [step - every * back for back in reversed(range(used))])

    def _blocks(self, step: int, every: int) -> Merge:
        """A mean of block means is a mean of all their samples."""
        used, between = min(WINDOW, (step - self._unit) // every), self._unit // 16
        steps = range(step - used * every + between, step + 1, between)
        return Merge("block", every, WINDOW, used, tuple(steps), coefficients.sma(len(steps)))


def _add(plan: dict[int, list[Merge]], step: int, merges: list[Merge]) -> None:
    known = plan.setdefault(step, [Merge("raw", 0, 1, 1, (step,), (1.0,))])
    known += [merge for merge in dict.fromkeys(merges) if merge not in known]


def _merge(kind: str, every: int, asked: int, steps: list[int]) -> Merge:
    name, parameters = KINDS[kind]
    return Merge(kind, every, asked, len(steps), tuple(steps), coefficients.compute(name, len(steps), **parameters))


def _growing(steps: list[int]) -> Merge:
    """An EMA whose horizon grows with the run."""
    weights = coefficients.ema(len(steps), half_life=HALF_LIFE * steps[-1], times=steps)
    return Merge("ema 5%", 0, max(NESTED), len(steps), tuple(steps), weights)


def _further(steps: list[int]) -> list[Merge]:
    """Beyond the mean of the newer half of the snapshots, by steps that a view may choose among."""
    weights = {kind: coefficients.extrapolated(len(steps), step=step) for kind, step in FURTHER.items()}
    return [Merge(kind, 0, ON_A_LINE, len(steps), tuple(steps), found) for kind, found in weights.items()]
