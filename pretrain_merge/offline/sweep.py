"""Merges that a run could have had, evaluated afterwards: over its checkpoints, as the callback does over snapshots.

This module knows the options and what is promised of them. The work is done by a `SweepJob`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_merge.config import SPAN
from pretrain_merge.offline.sweep_job import Progress, Sweep, SweepJob
from pretrain_merge.offline.ways import EvaluateLike
from pretrain_merge.records.modes import Mode

_SPAN = SPAN  # no merge point before, whose losses a limit could follow, is known here


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        checkpoints: Their number.
        views: Names of what is merged.
        points: Merge points.
        evaluations: Of raw and merged models together, those that are done already included.
    """

    checkpoints: int
    views: tuple[str, ...]
    points: int
    evaluations: int


def sweep_checkpoints(
    sources: Sequence[str | Path],
    out: str | Path,
    evaluate: EvaluateLike,
    *,
    window: int = 10,
    views: Sequence[str | Mapping[str, Any]] | None = None,
    span: float | str | None = _SPAN,
    intervals: Sequence[int] = (1, 2),
    every: int | str | None = None,
    start: int | str = 0,
    merge_every: int | str | None = None,
    breaks: Mapping[str, bool] | None = None,
    lr_tolerance: float = 1e-3,
    steps: Sequence[int] | None = None,
    base: str | Path | None = None,
    newest: Sequence[str] = (),
    average: Sequence[str] = (),
    metric: str | None = None,
    mode: Mode | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Evaluate raw checkpoints and merges of them, as the callback would have done while they were trained.

    At every merge point raw and all views are measured on the same batches with the same random numbers. The result is
    a folder with a `merges.jsonl` like a live run's, for `report`, `forecast` and `forecast_anneal`. It appears when
    all is done; after a kill the same call goes on behind the last finished point.

    Args:
        sources: Checkpoints, or folders of them, as `merge_checkpoints` takes them.
        out: The folder to be made.
        evaluate: A LightningModule and its validation loaders or datamodule (and a Trainer, for precision and the
            like), as a tuple; or a function from a folder, as `merge_checkpoints` writes it, to metrics; or text: a
            configuration of LightningCLI ('config.yaml'), 'package.module:function' which returns such a tuple, or a
            command that takes a folder as its last word, or where it says {folder}, and prints a JSON object of
            metrics on its last line.
        window: Checkpoints that may be merged with each other, newest first.
        views: Named merges, as in the callback's `views`; None: plain means of 2, 4, 8, … checkpoints and of the whole
            window, and what the callback makes by default ('sma') and with the weights of a decay ('wsm').
        span: Views that name no number take the newest checkpoints that span at most this share of the run since its
            last break, as in the callback; None: all that are there.
        intervals: Views of a fixed number are also made of every so-many-th checkpoint: 'sma4-every2'.
        every: Steps between checkpoints that are used; None: each is.
        start: No checkpoint before this step.
        merge_every: Merge at the first checkpoint at or after each multiple; None: at each.
        breaks: What ends a stretch of checkpoints that are merged with each other, {"lr": False} for runs whose
            learning rate decays. Rates are known of Lightning's checkpoints.
        lr_tolerance: Relative change of a learning rate that counts as a break.
        steps: Of the sources, where neither content nor name says them.
        base: A checkpoint with tensors that the sources lack.
        newest: Patterns of tensors that come from the newest checkpoint of a merge.
        average: Patterns of running statistics of BatchNorm that are merged.
        metric: By which views are compared; None: the loss, else the first that was measured.
        mode: Whether the smallest or the largest value is the best; None: as the metric's name tells.
        progress: Called with the number of evaluations done and in all.

    Returns:
        Records and the comparison of the views.

    Raises:
        CheckpointError: A checkpoint cannot be read as plain data, or `out` exists or cannot be written.
        MergeInputError: The checkpoints are not of one model, not of the module's, or one is not finite.
        ConfigError: An option is not one, or there is nothing to merge.
        EvaluationError: An evaluation failed, or gave no numbers.
    """
    keys = {
        "window": window, "views": views, "span": span, "every": every, "start": start, "merge_every": merge_every,
        "breaks": dict(breaks or {}), "lr_tolerance": lr_tolerance,
    }  # fmt: skip
    job = SweepJob.of(sources, out, keys, intervals=intervals, steps=steps, base=base, newest=newest, average=average)
    return job.run(evaluate, metric, mode, progress or (lambda done, total: None))


def plan_sweep(sources: Sequence[str | Path], out: str | Path, **options: Any) -> SweepPlan:
    """What `sweep_checkpoints` would do with these arguments; nothing is evaluated.

    Raises:
        PretrainMergeError: As `sweep_checkpoints` would before its first evaluation.
    """
    own = ("intervals", "steps", "base", "newest", "average")
    keys = {key: value for key, value in options.items() if key not in own}
    job = SweepJob.of(sources, out, keys, **{key: options[key] for key in own if key in options})
    return SweepPlan(len(job.sources), tuple(view.name for view in job.views), len(job.points), job.num_evaluations)
