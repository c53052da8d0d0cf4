"""What is trained, what is kept of it, and what was promised.

A line of the file is one run: its merge points in short, for each set of lines that watched it.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("runs.jsonl")
STEPS = 2000
_AT_6 = {"name": "at_6", "kind": "sma", "span": 0.06}  # what a view was before its limit followed the run
_WHOLE = {"name": "unlimited", "kind": "sma", "span": None}  # what every view was before views limited themselves
LINES: Mapping[str, Mapping[str, Any]] = {
    "readme": {"window": 10, "every": "1%", "views": ["sma", "sma5", _AT_6, _WHOLE]},
    "fixed": {"window": 10, "every": 100, "views": ["sma", _AT_6, _WHOLE]},  # the README's earlier lines
}
FROM_QUARTER, FROM_TENTH = STEPS // 4, STEPS // 10
LEAST_BELOW, MOST_ABOVE = 0.97, 0.005  # of the merges past the first quarter; of the loss past the first tenth


@dataclass(frozen=True)
class Run:
    """One run of the script.

    Attributes:
        family: "dense" or "moe".
        lr: Its constant learning rate after 100 steps of warm-up.
        seed: Draws weights and data.
    """

    family: str
    lr: float
    seed: int


RUNS = tuple(Run(family, lr, seed) for seed in range(5) for family in ("dense", "moe") for lr in (3e-3, 1e-2, 1e-3))


def missing(path: Path) -> list[Run]:
    """Runs that the file does not hold."""
    done = [run for run, _ in read(path)]
    return [run for run in RUNS if run not in done]


def train(run: Run, texts: Any, *, steps: int = STEPS) -> dict[str, list[Any]]:
    """Train under all lines at once, which leave the run as it is; returns the merge points of each."""
    import lightning as L

    from benchmarks.first_run.script import GPT, loaders
    from pretrain_merge import ModelMerging
    from pretrain_merge.demo.fitting import quiet
    from pretrain_merge.records import read_records

    L.seed_everything(run.seed, verbose=False)
    watching = [ModelMerging(name=name, **lines) for name, lines in LINES.items()]
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=watching,
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(GPT(run.lr, moe=run.family == "moe"), *loaders(texts.train, texts.validation))
        files = {name: Path(folder) / name / "merges.jsonl" for name in LINES}
        return {name: [_point(record) for record in read_records(path)] for name, path in files.items()}


def append(path: Path, run: Run, points: Mapping[str, list[Any]], about: Mapping[str, Any]) -> None:
    """Add a run's line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(run), "points": points, "about": about}) + "\n")


def read(path: Path = FILE) -> Iterator[tuple[Run, Mapping[str, list[Any]]]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        content = json.loads(line)
        yield Run(content["family"], content["lr"], content["seed"]), content["points"]


def verdicts(path: Path = FILE) -> list[dict[str, Any]]:
    """For each set of lines, view, family and rate: how often merged is below raw, and how far above at worst."""
    found: dict[tuple[Any, ...], list[list[tuple[int, float]]]] = {}
    for run, points in read(path):
        for name, merges in points.items():
            for view in dict.fromkeys(view for _, _, views in merges for view in views):
                curve = [(step, views[view][0] / raw - 1) for step, raw, views in merges if view in views]
                for family, lr in ((run.family, f"{run.lr:g}"), ("all", "all")):
                    found.setdefault((name, view, family, lr), []).append(curve)
    return [
        dict(zip(("lines", "view", "family", "lr"), key, strict=True)) | _verdict(curves)
        for key, curves in found.items()
    ]


def _verdict(curves: Sequence[Sequence[tuple[int, float]]]) -> dict[str, Any]:
    late = [gap for curve in curves for step, gap in curve if step > FROM_QUARTER]
    settled = [gap for curve in curves for step, gap in curve if step > FROM_TENTH]
    below, above = sum(gap < 0 for gap in late), max(0.0, *settled)
    return {
        "runs": len(curves),
        "below": below,
        "merges": len(late),
        "share": below / len(late),
        "above_at_worst": above,
        "at_end": sum(curve[-1][1] for curve in curves) / len(curves),
        "holds": below >= LEAST_BELOW * len(late) and above <= MOST_ABOVE,
    }


def _point(record: Any) -> list[Any]:
    views = {
        name: [round(metrics["val_loss"], 6), record.recipes[name].steps[-1] - record.recipes[name].steps[0]]
        for name, metrics in record.views.items()
        if not name.startswith("forecast/")  # a mean that nobody asked for
    }
    return [record.step, round(record.raw["val_loss"], 6), views]
