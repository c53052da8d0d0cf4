"""One merge point measured: raw and every view on the same batches, with raw back at the end, as one record.

This module knows the order of merge, evaluation and saving, and how long each took. It knows no trainer: how a model is
measured, and what of the run an evaluation may touch, is the caller's business.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pretrain_merge import parameters
from pretrain_merge.config import MergeConfig
from pretrain_merge.evaluation import reduction
from pretrain_merge.evaluation.reduction import How, Part
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import MergeRecord, Recipe
from pretrain_merge.runtime.log import WarnOnce

Keep = Callable[[str, Recipe, Mapping[str, float]], None]
Measure = Callable[[str], dict[str, float]]  # of the live model; the text is for a progress bar


def measured(
    config: MergeConfig,
    module: Any,
    merger: RollingMerger,
    measure: Measure,
    *,
    notices: WarnOnce,
    keep: Keep,
) -> MergeRecord:
    """Merge and measure every view that is ready.

    Args:
        config: What the record says of the run.
        module: The model, with raw weights; it has them again when this returns, however it ends.
        merger: Holds the window.
        measure: Called with the raw weights in the module, and with those of each view.
        notices: What the user was told already.
        keep: Called with each view's name, recipe and metrics while its weights are in the module.
    """
    ready = [view for view in merger.views if merger.why_not(view) is None]
    skipped = {view: reason for view in merger.views if (reason := merger.why_not(view))}
    for view, reason in skipped.items():
        notices.warn(f"{view} since {merger.window.segment}", f"step {merger.progress.step}: {reason}")
    recipes: dict[str, Recipe] = {}
    metrics: dict[str, dict[str, float]] = {}
    stopwatch = _Stopwatch()
    with merger.swap(module) as merge_view:
        raw = measure("raw")
        stopwatch.lap("evaluate_raw")
        for view in ready:
            recipes[view] = merge_view(view)
            stopwatch.lap(f"merge_{view}")
            metrics[view] = measure(view)
            stopwatch.lap(f"evaluate_{view}")
            keep(view, recipes[view], metrics[view])
            stopwatch.lap(f"save_{view}")
    spread = _spread(module, merger) if recipes else float("nan")
    stopwatch.lap("restore")
    return MergeRecord(
        name=config.name,
        **asdict(merger.progress),
        window=len(merger.window.valid),
        spread=spread,
        raw=raw,
        views=metrics,
        recipes=recipes,
        skipped=skipped,
        lr=merger.lr,
        phase=merger.phase,
        refused=merger.num_refused,
        since=merger.window.last_break.step if merger.window.last_break else 0,
        average=config.average,
        slot_dtype=config.slot_dtype or "",
        timing=stopwatch.seconds,
    )


def _spread(module: Any, merger: RollingMerger) -> float:
    """That of the whole model. A merge itself communicates nothing: two numbers of each rank are added up here."""
    sums = merger.spread_sums or Spread(0.0, 0.0)
    how: How = "sum" if parameters.is_sharded(module) else "mean"
    parts = {name: Part(value, how=how) for name, value in zip(Spread._fields, sums, strict=True)}
    return Spread(**reduction.over_ranks(parts)).relative_rms


class _Stopwatch:
    """Wall-clock seconds between laps, summed by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, label: str) -> None:
        now = time.perf_counter()
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self._last
        self._last = now
