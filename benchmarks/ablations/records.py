"""Results on disk: one small JSON file a run. Knows the format, neither torch nor Lightning."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.result_files import as_object, write_whole

FOLDER = Path(__file__).with_name("records")
_DIGITS = 6  # of a loss in nats: a thousandth of what is told apart here


class Row(NamedTuple):
    """One measured merge.

    Attributes:
        kind: As in `merges.Merge`, as are the next three.
        every: Interval in steps, 0 for "1%".
        asked: Snapshots of the view.
        used: Snapshots there were.
        span: Steps between the oldest and the newest model.
        choosing: Loss on the half of the held-out text that rules may look at.
        judging: Loss on the other half.
    """

    kind: str
    every: int
    asked: int
    used: int
    span: int
    choosing: float
    judging: float

    @property
    def loss(self) -> float:
        """On both halves together, which are of one size."""
        return (self.choosing + self.judging) / 2


@dataclass(frozen=True)
class Result:
    """What is known of one run.

    Attributes:
        name: Of the run.
        setup: What was trained.
        parameters: Size of the model.
        constant: Merges at constant rate, by step.
        decay: The same under the falling rate; empty where none was trained.
        routing: Routers by step; empty for dense models.
        seconds: CPU time of its parts.
    """

    name: str
    setup: Mapping[str, Any]
    parameters: int
    constant: Mapping[int, list[Row]]
    decay: Mapping[int, list[Row]] = field(default_factory=dict)
    routing: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def write(path: Path, setup: Mapping[str, Any], result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a run's file in one step, so that what was interrupted leaves no half of one."""
    rounded = {
        part: {str(step): [_rounded(row) for row in rows] for step, rows in result[part].items()}
        for part in ("constant", "decay")
    }
    content = {
        "setup": setup,
        "parameters": result["parameters"],
        **rounded,
        "routing": {str(step): _rounded(found) for step, found in result["routing"].items() if found},
        "seconds": _rounded(result["seconds"], 1),
        "about": about,
    }
    write_whole(path, as_object(f" {json.dumps(key)}: {_part(value)}" for key, value in content.items()))


def read(path: Path) -> Result:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Result(
        name=content["setup"]["name"],
        setup=content["setup"],
        parameters=content["parameters"],
        constant={int(step): [Row(*row) for row in rows] for step, rows in content["constant"].items()},
        decay={int(step): [Row(*row) for row in rows] for step, rows in content["decay"].items()},
        routing={int(step): found for step, found in content["routing"].items()},
        seconds=content["seconds"],
    )


def read_all(folder: Path = FOLDER) -> list[Result]:
    return [read(path) for path in sorted(folder.glob("*.json"))]


def _part(value: Any) -> str:
    if not isinstance(value, dict) or not any(isinstance(item, dict | list) for item in value.values()):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "\n }"


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list | tuple) else value
