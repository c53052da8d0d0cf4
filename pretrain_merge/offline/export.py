"""A merged model, or any one checkpoint or snapshot, as what another program reads.

This module knows what each program asks for. Folders are written as a merge of one checkpoint is.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pretrain_merge.errors import ConfigError, MergeInputError
from pretrain_merge.offline import recognise
from pretrain_merge.offline.decision import Optimizer
from pretrain_merge.offline.merge import merge_sources
from pretrain_merge.offline.options import new_folder
from pretrain_merge.offline.tensors import Source

Target = Literal["ckpt", "hf", "safetensors"]


def export_checkpoint(
    folder: str | Path,
    out: str | Path,
    *,
    to: Target,
    base: str | Path | None = None,
    optimizer: Optimizer = "newest",
) -> Path:
    """Write a merged model, or one checkpoint or snapshot, for another program.

    Args:
        folder: A merged folder, a snapshot of a window, or any checkpoint that `merge_checkpoints` reads.
        out: The file (ckpt) or folder to be made.
        to: 'ckpt' is a Lightning checkpoint, which `Trainer.test` and `fit` take; 'hf' a folder for `from_pretrained`;
            'safetensors' a plain one.
        base: For 'ckpt', a Lightning checkpoint of the run: loops, hyperparameters, optimizer, and the tensors that
            `folder` lacks. For the others a checkpoint that gives those; for 'hf' a folder with `config.json`.
        optimizer: For 'ckpt': the 'newest' is the base's, 'average' what `merge_checkpoints(optimizer='average')` left
            in the folder; with 'drop' the file can be tested and loaded, and not resumed.

    Returns:
        What was made.

    Raises:
        CheckpointError: Something cannot be read as plain data, or `out` exists or cannot be written.
        MergeInputError: The base is of another model.
        ConfigError: A base is needed, or what was asked for is not in the folder.
    """
    if to not in ("ckpt", "hf", "safetensors"):
        raise ConfigError(f"to: {to!r} is not known. Allowed: 'ckpt', 'hf', 'safetensors'.")
    target = new_folder(out)
    # all is opened before anything is made, so a refusal leaves nothing
    source = recognise.find_one(folder)
    based = recognise.find_one(base) if base is not None else None
    if to == "ckpt":
        if based is None or based.format != "lightning":
            raise ConfigError(
                "base: a Lightning checkpoint needs one of the same run, which has its loops, hyperparameters and "
                "optimizer. Name a .ckpt file, for instance last.ckpt."
            )
        # folders are written without torch, which takes longer to load than they take
        from pretrain_merge.offline.lightning_file import write_lightning

        write_lightning(source, based, target, optimizer)
        return target
    if to == "hf":
        source = _as_hugging_face(source, based)
    merge_sources([source], target, [1.0], newest=["*"], base=based)
    return target


def _as_hugging_face(source: Source, base: Source | None) -> Source:
    """With the names and companions that the model has in a folder of Hugging Face."""
    companions = source.companions or (base.companions if base is not None else ())
    if not any(path.endswith("/config.json") for path in companions):
        raise ConfigError(
            f"to='hf' needs a config.json, and {source.place} has none. Name as base a folder that has it, such as the "
            f"one of the model that training began with."
        )
    prefix = _prefix(source, base) if base is not None else ""
    # from_pretrained looks for the names of the folder that training began with
    own = {name.removeprefix(prefix): name for name in source.tensors}
    return replace(
        source,
        tensors={short: source.tensors[name] for short, name in own.items()},
        ties={a.removeprefix(prefix): b.removeprefix(prefix) for a, b in source.ties.items()},
        locate=lambda short: source.locate(own[short]),
        companions=companions,
    )


def _prefix(source: Source, base: Source) -> str:
    """What a wrapping module puts before every name of the model."""
    names = {*source.tensors, *source.ties}
    some = next(iter(sorted(base.tensors)))
    for name in sorted(names, key=len):
        if name.endswith(some) and all(f"{name.removesuffix(some)}{other}" in names for other in base.tensors):
            return name.removesuffix(some)
    raise MergeInputError(
        f"{base.place} is of another model than {source.place}: no part of it has all of its names, such as {some}. "
        f"Name the folder of the model that training began with."
    )
