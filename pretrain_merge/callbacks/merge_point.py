"""One merge point of a Trainer's run, measured by Lightning's own loop, and what is odd about the result.

This module knows what may end an evaluation early. In which order views are merged and measured, it leaves to
`merging.measured`.
"""

from collections.abc import Mapping
from typing import Any

from pretrain_merge.config import MergeConfig
from pretrain_merge.evaluation import evaluate
from pretrain_merge.evaluation.evaluate import Evaluator
from pretrain_merge.evaluation.loaders import EvaluationInterrupted
from pretrain_merge.merging import measured as merge_and_measure
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.records import MergeRecord
from pretrain_merge.runtime import signals
from pretrain_merge.runtime.log import WarnOnce


def measured(
    config: MergeConfig,
    trainer: Any,
    module: Any,
    merger: RollingMerger,
    *,
    evaluators: Mapping[str, Evaluator],
    notices: WarnOnce,
    keep: merge_and_measure.Keep,
) -> MergeRecord | None:
    """Merge and measure every view that is ready.

    Args:
        config: How to evaluate, and what the record says of the run.
        trainer: A Trainer between two batches of training.
        module: Its module, with raw weights; it has them again when this returns, however it ends.
        merger: Holds the window.
        evaluators: Further evaluations by name.
        notices: What the user was told already.
        keep: Called with each view's name, recipe and metrics while its weights are in the module.

    Returns:
        The record; None where a signal ended the evaluation early.
    """
    isolated = evaluate.isolated(
        trainer,
        module,
        evaluators=evaluators,
        validate=config.validate,
        stateful_data=config.stateful_data,
        merged=merger.tensors(module).values(),
        notices=notices,
    )
    try:
        # held outermost: a handler that saves a checkpoint must find raw weights and the user's own callbacks
        with signals.deferred(), isolated as measure:
            record = merge_and_measure.measured(config, module, merger, measure, notices=notices, keep=keep)
    except EvaluationInterrupted:
        return None
    if not record.raw and not any(record.views.values()):
        notices.warn(
            "nothing",
            "merges are made, but nothing is measured: no validation loader and no evaluator, or a validation_step "
            "that logs nothing.",
        )
    if record.raw and record.spread > 0 and record.raw in record.views.values():
        notices.warn(
            "equal",
            f"step {record.step}: raw and merged metrics are equal bit for bit, but the weights differ. Does "
            f"the module validate with weights of its own, such as an average that it swaps in? Measure merges with an "
            f"evaluator, or let that hook return early where pretrain_merge.is_evaluating_merge().",
        )
    return record
