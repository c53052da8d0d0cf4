"""What a restart gains over a control, paired over seeds. Reads results; knows neither figures nor words."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.ablations.gains import Spread
from benchmarks.restart.records import Arm, Result

Value = Callable[[Arm], float | None]


def of_question(results: Sequence[Result], question: str) -> list[Result]:
    """All seeds of a question that have arms: a run that never collapsed has nothing to restart from."""
    return [result for result in results if result.question == question and result.arms]


def at(step: int) -> Value:
    """Held-out loss so many steps after the restart."""
    return lambda arm: arm.losses.get(step)


def other_at(step: int) -> Value:
    """The same on the text of before."""
    return lambda arm: arm.other_losses.get(step)


def tail(arm: Arm) -> float | None:
    """Held-out loss of the mean of the last hundred iterates."""
    return arm.tail


def norm(first: int, last: int) -> Value:
    """Mean norm of the gradient from one step after the restart to another, multiples of ten."""
    return lambda arm: sum(chosen) / len(chosen) if (chosen := arm.norms[first // 10 : last // 10]) else None


def unsteadiness(first: int, last: int) -> Value:
    """How far the curve of the gradient norm moves from one point to the next, as a share of its mean."""

    def value(arm: Arm) -> float | None:
        chosen = arm.norms[first // 10 : last // 10]
        moves = [abs(later - earlier) for earlier, later in pairwise(chosen)]
        return sum(moves) / len(moves) / (sum(chosen) / len(chosen)) if moves else None

    return value


def gain(results: Sequence[Result], arm: str, control: str, value: Value) -> Spread | None:
    """Change against the control of the same seed, in percent; below 0 is lower. None where no seed has both."""
    changes = []
    for result in results:
        found = [value(result.arms[name]) for name in (arm, control) if name in result.arms]
        if len(found) == 2 and found[0] is not None and found[1] is not None:
            changes.append(100.0 * (found[0] / found[1] - 1.0))
    return Spread.of(changes) if changes else None


class Survival(NamedTuple):
    """How restarts after a collapse ended.

    Attributes:
        alive: Of `num`, those that did not collapse again.
        num: Seeds.
        died: Steps until the others did.
    """

    alive: int
    num: int
    died: list[int]

    @classmethod
    def of(cls, results: Sequence[Result], arm: str) -> "Survival":
        found = [result.arms[arm] for result in results if arm in result.arms]
        died = sorted(item.died for item in found if item.died is not None)
        return cls(len(found) - len(died), len(found), died)
