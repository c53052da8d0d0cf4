"""Results on disk: one small JSON file for each question and seed. Knows the format, neither torch nor Lightning."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.result_files import as_object, write_whole

FOLDER = Path(__file__).with_name("records")
_DIGITS = 5  # of a loss in nats: a thousandth of what is told apart here
_NORMS = 10  # steps that a point of the gradient's curve stands for


@dataclass(frozen=True)
class Arm:
    """What became of one restart.

    Attributes:
        losses: Held-out loss by steps since the restart.
        other_losses: The same on a second text; empty where there is none.
        norms: Norm of the gradient, means of ten steps.
        tail: Held-out loss of the mean of the last hundred iterates; None where it died.
        died: Steps until the training loss collapsed; None where it did not.
    """

    losses: Mapping[int, float]
    other_losses: Mapping[int, float] = field(default_factory=dict)
    norms: tuple[float, ...] = ()
    tail: float | None = None
    died: int | None = None


@dataclass(frozen=True)
class Result:
    """One question, one seed.

    Attributes:
        question: Its name.
        seed: Of the trunk.
        setup: What was trained.
        arms: Restarts by name.
    """

    question: str
    seed: int
    setup: Mapping[str, Any]
    arms: Mapping[str, Arm]


def path_of(folder: Path, question: str, seed: int) -> Path:
    return folder / f"{question}-{seed}.json"


def write(path: Path, result: Result, about: Mapping[str, Any]) -> None:
    """Write a result in one step, so that what was interrupted leaves no half of one."""
    lines = [
        f' "setup": {json.dumps(result.setup)}',
        f' "about": {json.dumps(about)}',
        *(f" {json.dumps(name)}: {json.dumps(_short(arm))}" for name, arm in result.arms.items()),
    ]
    write_whole(path, as_object(lines))


def read(path: Path) -> Result:
    content = json.loads(path.read_text(encoding="utf-8"))
    setup, _ = content.pop("setup"), content.pop("about")
    question, seed = path.stem.rsplit("-", 1)
    return Result(question, int(seed), setup, {name: _arm(found) for name, found in content.items()})


def read_all(folder: Path = FOLDER) -> list[Result]:
    return [read(path) for path in sorted(folder.glob("*.json"))]


def curve(norms: list[float]) -> tuple[float, ...]:
    """Means of ten steps each."""
    return tuple(fmean(norms[first : first + _NORMS]) for first in range(0, len(norms), _NORMS))


def _short(arm: Arm) -> dict[str, Any]:
    """Without what is empty, rounded."""
    found = {
        "losses": {step: round(loss, _DIGITS) for step, loss in arm.losses.items()},
        "other_losses": {step: round(loss, _DIGITS) for step, loss in arm.other_losses.items()},
        "norms": [float(f"{norm:.3g}") for norm in arm.norms],
        "tail": None if arm.tail is None else round(arm.tail, _DIGITS),
        "died": arm.died,
    }
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _arm(found: Mapping[str, Any]) -> Arm:
    losses, other = (
        {int(step): loss for step, loss in found.get(key, {}).items()} for key in ("losses", "other_losses")
    )
    return Arm(losses, other, tuple(found.get("norms", ())), found.get("tail"), found.get("died"))
