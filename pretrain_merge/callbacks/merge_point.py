"""One merge point measured: raw and every view on the same batches, with raw back at the end, as one record.

This module knows the order of merge, evaluation and saving, and how long each took. When a merge point is due, and
where its record goes, is the callback's business.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from pretrain_merge import parameters
from pretrain_merge.callbacks.failures import Failures
from pretrain_merge.config import MergeConfig
from pretrain_merge.evaluation import evaluate, reduction
from pretrain_merge.evaluation.evaluate import Evaluator
from pretrain_merge.evaluation.loaders import EvaluationInterrupted
from pretrain_merge.evaluation.reduction import How, Part
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import FORECAST, RAW, MergeRecord, Recipe
from pretrain_merge.runtime import signals
from pretrain_merge.runtime.log import WarnOnce

Keep = Callable[[str, Recipe, Mapping[str, float], bool], None]


def measured(
    config: MergeConfig,
    trainer: Any,
    module: Any,
    merger: RollingMerger,
    *,
    views: Sequence[str],
    evaluators: Mapping[str, Evaluator],
    notices: WarnOnce,
    keep: Keep,
    isolate: Callable[..., AbstractContextManager[evaluate.Measure]] | None = None,
) -> MergeRecord | None:
    """Merge and measure every view that is ready.

    Args:
        config: How to evaluate, and what the record says of the run.
        trainer: A Trainer between two batches of training.
        module: Its module, with raw weights; it has them again when this returns, however it ends.
        merger: Holds the window.
        views: Which of its views.
        evaluators: Further evaluations by name.
        notices: What the user was told already.
        keep: Called with each view's name, recipe and metrics while its weights are in the module, and whether a metric
            may be missing, since an evaluation failed.
        isolate: How a Trainer of another kind evaluates; None: Lightning's.

    Returns:
        The record; None where a signal ended the evaluation early.
    """
    # asked before the swap: a view that cannot be merged is a sentence, not an exception in the middle
    ready = [view for view in views if merger.why_not(view) is None]
    skipped = {view: reason for view in views if (reason := merger.why_not(view))}
    for view, reason in skipped.items():
        if view.startswith(f"{FORECAST}/"):
            continue  # nobody asked for it, and the forecast says what it misses
        notices.warn(f"{view} since {merger.window.segment}", f"step {merger.progress.step}: {reason}")
    recipes: dict[str, Recipe] = {}
    metrics: dict[str, dict[str, float]] = {}
    known: dict[Recipe, dict[str, float]] = {}
    stopwatch, failures = _Stopwatch(), Failures(config.on_error, notices)
    isolated = (isolate or evaluate.isolated)(
        trainer,
        module,
        evaluators=failures.guarded(evaluators, module),
        validate=config.validate,
        stateful_data=config.stateful_data,
        merged=merger.tensors(module).values(),
        notices=notices,
    )
    try:
        # held outermost: a handler that saves a checkpoint must find raw weights and the user's own callbacks
        with signals.deferred(), isolated as measure:
            with merger.swap(module) as merge_view:
                raw = failures.measured(measure, RAW)
                stopwatch.lap("evaluate_raw")
                if config.save.raw:
                    keep(RAW, Recipe((merger.progress.step,), (1.0,)), raw, bool(failures.reasons))
                    stopwatch.lap("save_raw")
                for view in ready:
                    recipes[view] = merge_view(view)
                    stopwatch.lap(f"merge_{view}")
                    # a limited `sma` and a forecast's mean are often one merge; a user's evaluator sees each view
                    same = known.get(recipes[view]) if view.startswith(f"{FORECAST}/") else None
                    metrics[view] = dict(same) if same is not None else failures.measured(measure, view)
                    known[recipes[view]] = metrics[view]
                    stopwatch.lap(f"evaluate_{view}")
                    keep(view, recipes[view], metrics[view], bool(failures.reasons))
                    stopwatch.lap(f"save_{view}")
            # after the swap: where no view saw the whole window, its end takes one more pass
            spread = _spread(module, merger) if recipes else float("nan")
            stopwatch.lap("restore")
    # raw is back; the merge is owed, and made by the run that is resumed
    except EvaluationInterrupted:
        return None
    if not raw and not any(metrics.values()) and not failures.reasons:
        notices.warn(
            "nothing",
            "merges are made, but nothing is measured: no validation loader and no evaluator, or a validation_step "
            "that logs nothing.",
        )
    # equal bits of different weights: more likely a module that swaps than a coincidence
    if raw and spread > 0 and raw in metrics.values():
        notices.warn(
            "equal",
            f"step {merger.progress.step}: raw and merged metrics are equal bit for bit, but the weights differ. Does "
            f"the module validate with weights of its own, such as an average that it swaps in? Measure merges with an "
            f"evaluator, or let that hook return early where pretrain_merge.is_evaluating_merge().",
        )
    return MergeRecord(
        name=config.name,
        **asdict(merger.progress),
        window=len(merger.window.valid),
        spread=spread,
        raw=raw,
        views=metrics,
        recipes=recipes,
        skipped=skipped | failures.reasons,
        lr=merger.lr,
        phase=merger.phase,
        refused=merger.num_refused,
        spikes=merger.num_spikes,
        since=merger.window.last_break.step if merger.window.last_break else 0,
        why_since=merger.window.last_break.reason if merger.window.last_break else "",
        average=config.average,
        slot_dtype=config.slot_dtype or "",
        timing=stopwatch.seconds,
    )


def _spread(module: Any, merger: RollingMerger) -> float:
    """That of the whole model. A merge itself communicates nothing: two numbers of each rank are added up here."""
    sums = merger.spread_sums or Spread(0.0, 0.0)
    # replicas hold the same and are averaged, so that rounding cannot make them differ
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
