"""Raw and merged weights measured by a Hugging Face Trainer's own evaluation, without its run noticing.

This module knows what `Trainer.evaluate` touches besides the model: callbacks, logs, counters, the control object whose
`should_evaluate` it resets (P39), loaders, random numbers. It knows no windows and no views.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from pretrain_merge import parameters
from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import isolation
from pretrain_merge.evaluation.evaluate import Evaluator, Measure
from pretrain_merge.evaluation.loaders import EvaluationInterrupted
from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.evaluation.settings import settings_kept
from pretrain_merge.runtime import ranks, signals
from pretrain_merge.runtime.evaluating import evaluating_merge
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.runtime.random_state import random_state_kept

# speed is not a property of weights; two equal runs would differ in it
_NOT_MEASURED = ("epoch", "_runtime", "_per_second", "_preparation_time", "_compilation_time", "num_input_tokens_seen")


@contextmanager
def isolated(
    trainer: Any,
    module: Any,
    *,
    evaluators: Mapping[str, Evaluator],
    validate: bool,
    stateful_data: str,
    ignored: list[str] | None,
    merged: Iterable[Tensor],
    notices: WarnOnce,
) -> Iterator[Measure]:
    """Evaluate the live model as often as needed, each time with the same random numbers.

    Args:
        trainer: A Trainer inside `train`, between two steps.
        module: Its model.
        evaluators: Further evaluations by name; each gets the model in eval mode and returns metrics.
        validate: Whether to run the Trainer's own evaluation, where it has data for one.
        stateful_data: Of no use here: the Trainer builds its loaders anew for each evaluation.
        ignored: Keys of the model's outputs that its own evaluations ignore.
        merged: Live tensors whose values the caller changes between evaluations, and puts back itself.
        notices: What the user was told already.

    Yields:
        A function that gives metrics: those of `Trainer.evaluate` under their own names, those of evaluators as
        `<evaluator>/<key>`.

    Raises:
        EvaluationError: An evaluator gave something else than numbers.
    """
    with random_state_kept() as set_back:
        parameters.reshard(module)
        memento = Memento(_parts_of(trainer), merged=merged, notices=notices)

        def measure(label: str) -> dict[str, float]:
            if signals.pending():  # it waits for raw weights: the sooner the better
                raise EvaluationInterrupted
            with ranks.all_or_none(f"evaluate {label}"), ExitStack() as kept:
                kept.enter_context(isolation.gradients_hidden(module))  # of an evaluator that calls backward
                kept.callback(memento.put_back)
                kept.callback(parameters.reshard, module)  # P18: a forward leaves gathered parameters behind
                kept.enter_context(settings_kept())
                kept.enter_context(evaluating_merge())
                kept.enter_context(isolation.buffers_of_rank_0(trainer.model_wrapped))
                metrics = {}
                if validate and _has_data(trainer):
                    set_back()
                    metrics = _evaluated(trainer, ignored, notices)
                for name, evaluator in evaluators.items():
                    set_back()
                    module.eval()
                    with torch.no_grad(), signals.keyboard_interrupt_allowed():
                        values = evaluator(module)
                    metrics |= {f"{name}/{key}": value for key, value in _numbers(name, values).items()}
            return metrics

        yield measure


def _evaluated(trainer: Any, ignored: list[str] | None, notices: WarnOnce) -> dict[str, float]:
    """One `Trainer.evaluate`, of which no callback, reporter or history hears."""
    with (
        isolation.replaced(trainer.callback_handler, callbacks=[]),
        isolation.replaced(trainer, log=lambda *_, **__: None),
        # workers that persist would be a pass further in the user's next evaluation
        isolation.replaced(trainer.args, dataloader_persistent_workers=False),
        signals.keyboard_interrupt_allowed(),
    ):
        measured = trainer.evaluate(ignore_keys=ignored)
    kept = {key: value for key, value in measured.items() if not key.endswith(_NOT_MEASURED) and "_mem_" not in key}
    numbers = {key: float(value) for key, value in kept.items() if isinstance(value, int | float)}
    if others := kept.keys() - numbers.keys():
        notices.warn("others", f"not recorded, since they are not numbers: {', '.join(sorted(others))}.")
    return numbers


def _has_data(trainer: Any) -> bool:
    builds_its_own = type(trainer).get_eval_dataloader is not Trainer.get_eval_dataloader
    return trainer.eval_dataset is not None or builds_its_own


def _parts_of(trainer: Any) -> dict[str, Any]:
    """What an evaluation can reach of a run; first what is nearest to the weights."""
    return {
        "model": trainer.model,
        "trainer.optimizer": trainer.optimizer,
        "trainer.lr_scheduler": trainer.lr_scheduler,
        "trainer.control": trainer.control,
        "trainer.state": trainer.state,
        "trainer.accelerator": trainer.accelerator,
        "trainer.callback_handler": trainer.callback_handler,
        "trainer": trainer,
    }


def _numbers(source: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    try:
        numbers = {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"{source} gave {metrics!r}, of which not every value is a number. Return a mapping from names to numbers "
            f"or one-element tensors."
        ) from error
    return numbers
