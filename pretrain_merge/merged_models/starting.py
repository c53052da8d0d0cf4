"""A new fit that begins from a merge. This module knows what would undo that; reading the folder is `loading`'s."""

from pathlib import Path
from typing import Any

from torch import nn

from pretrain_merge.errors import ConfigError
from pretrain_merge.merged_models.choosing import Which
from pretrain_merge.merged_models.loading import load_merged


def start_from_merged(module: nn.Module, path: str | Path, which: Which | None = None) -> dict[str, Any]:
    """Begin a fit of your own from a merged model: continued training, a decay, a fine-tune.

    Only weights are written, checked like those of `load_merged`; the optimizer and the schedule are those of the new
    fit, which begins at step 0. A short re-warm-up (30 steps) spares what a fresh optimizer costs, and the rate has to
    fall in the end: at a constant rate the gain of the merge is gone within 50 steps.

    Call it before `fit`, or in a hook before the first step (`setup`, `configure_model`, `on_fit_start`). A script that
    passes a `ckpt_path` to resume its own fit calls it before `fit`: what the checkpoint holds then counts.

    Args:
        module: The model as it was when the merge was saved; on each rank its own shards.
        path: A folder that `ModelMerging` or `merge_checkpoints` wrote, or the folder of a run.
        which: With the folder of a run: the 'best' of its merged models, by `save.best`, or the 'last' one.

    Returns:
        The provenance: steps, coefficients, the decay that they emulate, configuration, metrics.

    Raises:
        ConfigError: The module is being trained already, or its fit has resumed a checkpoint. The optimizer's state is
            of other weights, which would be lost without a word.
        CheckpointError: The folder is not a merged model, is damaged, or belongs to another model; nothing was changed.
    """
    _refuse_running(module)
    return load_merged(module, path, which)


def _refuse_running(module: nn.Module) -> None:
    # Lightning's own attribute: its property `trainer` raises where there is none, and this module imports no trainer
    trainer: Any = getattr(module, "_trainer", None)
    state = getattr(trainer, "state", None)
    if state is None or getattr(state, "fn", None) != "fit" or getattr(state, "status", None) != "running":
        return
    # Lightning sets `ckpt_path` behind `setup`, when it reads the file
    if resumed := trainer.ckpt_path:
        raise ConfigError(
            f"start_from_merged: this fit has resumed {resumed}, and its optimizer's state is of those weights. Call "
            f"it before fit, or give fit no ckpt_path; `export --to ckpt` puts a merge beside an optimizer's state."
        )
    if trainer.global_step:
        raise ConfigError(
            f"start_from_merged: the module is at step {trainer.global_step} of a fit, and its optimizer's state is of "
            f"other weights. Call it before fit or in on_fit_start; load_merged writes weights into any module."
        )
