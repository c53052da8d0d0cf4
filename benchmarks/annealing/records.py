"""The suite's results on disk: one small JSON file a run. Knows the format, neither torch nor Lightning.

A file holds, for each way of watching, the merge points in short: step, raw loss, and the loss of the mean of the
newest n snapshots by n. `Run.records` gives them back as what `ModelMerging` recorded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result_files import write_whole
from pretrain_merge.records import MergeRecord, Recipe

FOLDER = Path(__file__).with_name("records")
FRESH_FOLDER = FOLDER / "fresh"
RANDOM_FOLDER = FOLDER / "random"
METRIC = "val_loss"
EVERY = "every"  # watched so: the means are of every iterate, and named by their span
_DIGITS = 7  # of a loss; float32 has no more


@dataclass(frozen=True)
class Run:
    """One run of the suite, as read from its file.

    Attributes:
        name: Its name.
        setup: What was trained.
        records: Merge points by way of watching: "dense", "sparse", "block", or "every" in the random design.
        anneals: Real branches: `start`, `steps`, `shape`, `order` (0: the run's own batches), `loss`.
        parameters: Size of the model.
        seconds: CPU time of the run and of its branches.
    """

    name: str
    setup: Mapping[str, Any]
    records: Mapping[str, Sequence[MergeRecord]]
    anneals: Sequence[Mapping[str, Any]]
    parameters: int
    seconds: Mapping[str, float]


def write_run(path: Path, setup: Mapping[str, Any], result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a run's file in one step, so that an interrupted suite leaves no half of one."""
    watched = {name: _shortened(records) for name, records in result["records"].items()}
    _write(path, setup, result, watched, about)


def _write(
    path: Path,
    setup: Mapping[str, Any],
    result: Mapping[str, Any],
    watched: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    content = {
        "setup": setup,
        "parameters": result["parameters"],
        "watched": watched,
        "anneals": [{**anneal, "loss": round(anneal["loss"], _DIGITS)} for anneal in result["anneals"]],
        "seconds": {part: round(value, 1) for part, value in result["seconds"].items()},
        "about": about,
    }
    write_whole(path, _compact(content))


def write_random_run(path: Path, setup: Mapping[str, Any], result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a run of the random design, whose means are of every iterate and named by their span."""
    points = [
        [step, lr, round(raw, _DIGITS), {str(span): round(loss, _DIGITS) for span, loss in merged.items()}]
        for step, lr, raw, merged in result["points"]
    ]
    _write(path, setup, result, {EVERY: {"every": 1, "points": points}}, about)


def read_run(path: Path) -> Run:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Run(
        name=content["setup"]["name"],
        setup=content["setup"],
        records={name: _restored(name, watched) for name, watched in content["watched"].items()},
        anneals=content["anneals"],
        parameters=content["parameters"],
        seconds=content["seconds"],
    )


def read_calibrated() -> list[Run]:
    """The runs that the shipped calibration is fitted to: the chosen ones, and what is done of the random design."""
    return [*read_suite(FOLDER), *read_suite(RANDOM_FOLDER)]


def read_suite(folder: Path = FOLDER) -> list[Run]:
    return [read_run(path) for path in sorted(folder.glob("*.json"))]


def _shortened(records: Sequence[MergeRecord]) -> dict[str, Any]:
    recipe = next(recipe for record in records for recipe in record.recipes.values())
    points = [
        [
            record.step,
            record.lr[0],
            round(record.raw[METRIC], _DIGITS),
            {
                str(len(record.recipes[view].steps)): round(metrics[METRIC], _DIGITS)
                for view, metrics in record.views.items()
            },
        ]
        for record in records
    ]
    return {"every": recipe.steps[1] - recipe.steps[0], "points": points}


def _restored(name: str, watched: Mapping[str, Any]) -> list[MergeRecord]:
    return [_record(name, watched["every"], *point) for point in watched["points"]]


def _record(name: str, every: int, step: int, lr: float, raw: float, means: Mapping[str, float]) -> MergeRecord:
    if name == EVERY:  # a mean of all iterates of a span is that of a few blocks of them
        sizes = {number: _blocks(int(number)) for number in means}
    else:
        sizes = {number: (int(number), every) for number in means}
    recipes = {
        f"sma{key}": Recipe(tuple(step - apart * back for back in reversed(range(number))), (1 / number,) * number)
        for key, (number, apart) in sizes.items()
    }
    return MergeRecord(
        name=name,
        step=step,
        samples=0,
        tokens=0,
        window=max((int(number) for number in means), default=0),
        spread=float("nan"),
        raw={METRIC: raw},
        views={f"sma{number}": {METRIC: loss} for number, loss in means.items()},
        recipes=recipes,
        lr=(lr,),
        average="block" if name in ("block", EVERY) else "last",
    )


def _blocks(span: int) -> tuple[int, int]:
    """The least number of equal blocks, and their length."""
    number = next(number for number in range(2, span + 1) if span % number == 0)
    return number, span // number


def _compact(content: Mapping[str, Any]) -> str:
    """One line for each merge point and each branch: a diff of two suites can be read."""
    marks: dict[str, str] = {}

    def line(value: Any) -> str:
        marks[mark := f"@{len(marks)}@"] = json.dumps(value)
        return mark

    watched = {name: {**w, "points": [line(point) for point in w["points"]]} for name, w in content["watched"].items()}
    text = json.dumps({**content, "watched": watched, "anneals": [line(a) for a in content["anneals"]]}, indent=1)
    for mark, value in marks.items():
        text = text.replace(f'"{mark}"', value, 1)
    return text + "\n"
