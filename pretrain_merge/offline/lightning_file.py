"""A Lightning checkpoint with other weights than it was saved with.

This module knows what such a file is made of. Tensors are mapped from the files that they come from, and let go of as
they are written, so that neither model nor the optimizer's states need be in memory.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pretrain_merge.errors import CheckpointError, ConfigError, MergeInputError
from pretrain_merge.files import atomic
from pretrain_merge.offline import safetensors_format, torch_format, torch_objects
from pretrain_merge.offline.decision import Optimizer
from pretrain_merge.offline.files import Files, size_of
from pretrain_merge.offline.mapped import MappedTensors
from pretrain_merge.offline.tensors import Source
from pretrain_merge.offline.torch_archive import open_archive
from pretrain_merge.tensor_names import plain_name

_OPTIMIZER_FILE = "optimizer"
_CALLBACK = "ModelMerging"  # begins the key of our own state among those of callbacks
_OF_AVERAGES = ("current_model_state", "averaging_state")
_LISTED = 5
_HELD = 2**26  # bytes of mapped files that may be resident, beside the largest tensor


def write_lightning(source: Source, base: Source, target: Path, optimizer: Optimizer) -> None:
    """Write a file with the weights of one checkpoint and everything else of another.

    Args:
        source: Has the weights.
        base: A Lightning checkpoint of the same run.
        target: The file to be made.
        optimizer: Whose states go in, as for `export_checkpoint`.

    Raises:
        CheckpointError: Something cannot be read as plain data, or `target` cannot be written.
        MergeInputError: The base is of another model.
        ConfigError: Averaged states were asked for, and the source has none.
    """
    with Files() as files:
        content = _loaded(base.place, files)
        state = content["state_dict"]
        prefix = str(source.about.get("prefix") or "")
        tensors, of_base = MappedTensors(source, files), MappedTensors(base, files)
        mapped = [tensors, of_base]
        found = {name: tensors[name] for name in source.tensors}
        # strict loading asks for every name, tied or not; torch.save stores shared memory once
        found |= {alias: found[name] for alias, name in source.ties.items()}
        in_base = {plain_name(name): name for name in state}  # of a compiled model, for instance
        new = {in_base.get(f"{prefix}{name}", f"{prefix}{name}"): tensor for name, tensor in found.items()}
        problems = [f"{name} is not in the base" for name in new.keys() - state.keys()]
        problems += [
            f"{name} is {tuple(tensor.shape)} and {tuple(state[name].shape)} in the base"
            for name, tensor in new.items()
            if name in state and tensor.shape != state[name].shape
        ]
        if problems:
            more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise MergeInputError(
                f"{source.place} does not fit {base.place}: {'; '.join(sorted(problems)[:_LISTED])}{more}. Name a base "
                f"of the same run."
            )
        state.update(new)
        # our window is of the raw run; from here on it is another one
        callbacks = content.get("callbacks", {})
        for key in [key for key in callbacks if str(key).startswith(_CALLBACK)]:
            del callbacks[key]
        # what Lightning's averages of weights keep beside their mean: `fit` would go on from it and not from the merge
        for key in _OF_AVERAGES:
            content.pop(key, None)
        if optimizer == "drop":
            content.pop("optimizer_states", None)
            # a scheduler of optimizers that are not there would refuse to load
            content.pop("lr_schedulers", None)
        elif optimizer == "average":
            mapped.append(_average_optimizer(source, content, files))
        else:
            _set_optimizer(content, of_base, base.optimizer)
        _save(content, target, mapped)


def _average_optimizer(source: Source, content: dict[str, Any], files: Files) -> MappedTensors:
    folder = Path(source.place)
    paths = sorted(map(str, folder.glob(f"{_OPTIMIZER_FILE}*.safetensors"))) if folder.is_dir() else []
    if not paths:
        raise ConfigError(
            f"optimizer='average' needs averaged states, and {folder} has none. Merge with optimizer='average' first, "
            f"or take 'newest'."
        )
    averaged = safetensors_format.open_files(source.place, paths)
    states = torch_format.optimizer_tensors(content, torch.Tensor)
    if {name: tuple(item.shape) for name, item in states.items()} != {
        name: kind.shape for name, kind in averaged.tensors.items()
    }:
        raise MergeInputError(f"{folder} has optimizer states of another model than the base. Name a base of the run.")
    tensors = MappedTensors(averaged, files)
    _set_optimizer(content, tensors, averaged.tensors)
    return tensors


def _set_optimizer(content: dict[str, Any], tensors: MappedTensors, names: Collection[str]) -> None:
    """Tensors by the names that `torch_format.optimizer_tensors` gives them, in their places."""
    states = [optimizer["state"] for optimizer in content["optimizer_states"]] if names else []
    own_keys = [{str(key): key for key in state} for state in states]  # numbers, mostly
    for name in names:
        _, number, key, item = name.split("/", 3)
        states[int(number)][own_keys[int(number)][key]][item] = tensors[name]


def _loaded(path: str, files: Files) -> dict[str, Any]:
    """A Lightning checkpoint, its tensors mapped from the file."""
    open_archive(path, files, 0, size_of(path) or 0)  # with the errors of ours
    try:
        with torch.serialization.safe_globals(_plain_values(path)):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # whatever a class that the process lets through raises
        text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise CheckpointError(
            f"{path} has values that cannot be written again: {' '.join(text.split())[:200]}. Name a base of "
            f"plain data, or leave them out of its hyperparameters."
        ) from error


def _plain_values(path: str) -> list[Any]:
    """Classes of hyperparameters that the reader of merges passes over and torch's own refuses: here they are kept."""
    names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) & torch_objects.NAMES.keys()
    if any(name.startswith("numpy.") for name in names):
        # a dtype is of a class of its own, which the file does not name
        names |= {name for name in torch_objects.NAMES if name.startswith("numpy.dtypes.")}
    found = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        # by the closed list only, so what is imported is no choice of the file's author
        found.append((getattr(import_module(module), attribute), name))
    return found


class _Releasing:
    """A file that lets go of mapped pages as it is written: an optimizer's states are three models large.

    Args:
        file: What is written to.
        mapped: What is read from.
    """

    def __init__(self, file: BinaryIO, mapped: Sequence[MappedTensors]) -> None:
        self._file, self._mapped, self._held = file, mapped, 0

    def write(self, data: memoryview) -> int:
        """As a file's."""
        written = self._file.write(data)
        self._held += written
        if self._held > _HELD:
            self._held = 0
            for tensors in self._mapped:
                tensors.release()
        return written

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()


def _save(content: Mapping[str, Any], target: Path, mapped: Sequence[MappedTensors]) -> None:
    try:
        atomic.make_folder(target.parent)
        with atomic.draft(target) as draft:
            torch.save(dict(content), _Releasing(draft.file, mapped))  # type: ignore[arg-type]  # it needs no more
            draft.file.flush()
            with Files() as files:  # what was written can be read, before it has its name
                open_archive(str(draft.path), files, 0, draft.path.stat().st_size)
    except (OSError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {target}: {error}. Free space there, or choose another place.") from error
