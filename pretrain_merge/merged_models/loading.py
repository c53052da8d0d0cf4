"""A merged model from its folder into a module: checked to the last byte first, then written where the module lives.

This module knows state dicts and the folder layout. A module is read back from what its own `state_dict` says, so one
that returns copies there is loaded by its own `load_state_dict` and looked at again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pretrain_merge.errors import CheckpointError
from pretrain_merge.merged_models import whole_weights
from pretrain_merge.merged_models.choosing import Which, chosen
from pretrain_merge.merged_models.provenance import PROVENANCE, WITHDRAWN, read_provenance
from pretrain_merge.merged_models.state import EXTRA_STATE, TORCH_DTYPES, local, memory, tensors_of
from pretrain_merge.merged_models.whole_weights import WEIGHTS, Weights
from pretrain_merge.parameters import all_tensors, is_sharded
from pretrain_merge.parameters.bits import as_integers, copy_of, from_integers, same_bits, write_back
from pretrain_merge.runtime.log import logger
from pretrain_merge.tensor_names import plain_name

_LISTED = 5  # differences that a message names: another model has hundreds


@torch.no_grad()
def load_merged(module: nn.Module, path: str | Path, which: Which | None = None) -> dict[str, Any]:
    """Read a merged model into a module, strictly: every name, shape and dtype must be there, and nothing else.

    Args:
        module: The model to write into, as it was when the merge was saved.
        path: A folder that `ModelMerging` saved (`…/merged/step-00001000-sma`), of whatever number of ranks. A module
            that is sharded over ranks takes its own shards on each; no rank waits for another.
        which: With the folder of a run as `path`: the 'best' of its merged models, by `save.best`, or the 'last' one.

    Returns:
        The provenance: steps, coefficients, configuration, versions, metrics.

    Raises:
        CheckpointError: The folder is not a merged model, is damaged, or belongs to another model; nothing was changed.
    """
    folder = Path(path) if which is None else chosen(Path(path), which)
    provenance = read_provenance(folder)
    if provenance.get(WITHDRAWN):
        logger.warning(f"{folder} was withdrawn ({provenance[WITHDRAWN]}). Take an earlier merge where you can.")
    wanted = tensors_of(module, provenance["prefix"])
    try:
        # all that can be refused is, before the first byte is written into the module
        _refuse_damaged(folder, provenance["files"])
        with whole_weights.opened(folder) as weights:
            saved = _Saved(weights, provenance)
            if not set(saved.ties.values()) <= weights.names():
                raise CheckpointError(f"{folder / PROVENANCE} is damaged: {saved.ties}. Copy the folder again.")
            _refuse_other_model(folder, module, wanted, saved)
            if copies := _copies(module, wanted):
                _load_by_module(module, saved, copies)
            else:
                _write(module, wanted, saved)
    except OSError as error:
        # a CheckpointError is an OSError too, and says more already
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}). Copy the folder again.") from error
    return provenance


class _Saved:
    """What a folder holds, by the names of the module's own state dict."""

    def __init__(self, weights: Weights, provenance: Mapping[str, Any]) -> None:
        self._weights = weights
        self._as_integers: Mapping[str, str] = provenance["as_integers"]
        self.prefix: str = provenance["prefix"]
        self.ties: Mapping[str, str] = provenance["ties"]

    def stored(self) -> set[str]:
        """Names of the tensors in the files."""
        return self._weights.names()

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor in the files."""
        shape, spelled = self._weights.kind(name)
        dtype = TORCH_DTYPES.get(spelled)
        return shape, f"torch.{self._as_integers[name]}" if name in self._as_integers else str(dtype or spelled)

    def kind_of(self, name: str, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        """Shape and dtype that a tensor of a module must have in the files."""
        shaped = as_integers(tensor) if name in self._as_integers else tensor
        return tuple(shaped.shape), str(tensor.dtype)

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of it, where the module's own tensor is."""
        value = self._weights.like(name, tensor).to(tensor.device)
        return from_integers(value, tensor.dtype) if name in self._as_integers else value

    def whole(self, name: str) -> Tensor:
        """All of it."""
        return self._weights.whole(name)


def _write(module: nn.Module, wanted: Mapping[str, Tensor], saved: _Saved) -> None:
    extra_states = _modules_by_extra_state(module, saved.prefix)
    for name in sorted(saved.stored()):
        if _is_extra_state(name):
            extra_states[name].set_extra_state(saved.whole(name))
        else:
            _fill(name, local(wanted[name]), saved.like(name, wanted[name]))
    for alias, name in saved.ties.items():
        # this module does not tie them: each gets the values
        if memory(wanted[alias]) != memory(wanted[name]):
            _fill(alias, local(wanted[alias]), local(wanted[name]))


def _fill(name: str, target: Tensor, value: Tensor) -> None:
    try:
        write_back(target, value)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be loaded: {error}. Build it with .clone() in the module.") from error


def _load_by_module(module: nn.Module, saved: _Saved, copies: list[str]) -> None:
    """Load a module whose state dict shows copies of what it holds, and see whether it then shows what was saved."""
    if is_sharded(module):
        raise CheckpointError(
            f"the state_dict of {type(module).__name__} returns copies (of {copies[0]}), which cannot be loaded into a "
            f"module that is sharded. Load it before it is sharded."
        )
    live = all_tensors(module)
    # a method of the user's may raise when it has written half
    before = [copy_of(tensor) for tensor in live]
    state = dict(module.state_dict())
    for key, value in state.items():
        name = plain_name(key).removeprefix(saved.prefix)
        source = saved.ties.get(name, name)
        if source in saved.stored():
            state[key] = saved.whole(source) if _is_extra_state(name) else saved.like(source, value)
    try:
        module.load_state_dict(state)
        shown = tensors_of(module, saved.prefix)
        lost = [name for name in saved.stored() if not _is_extra_state(name) and not _shows(shown, saved, name)]
    except Exception as error:
        lost = [f"{copies[0]} ({error})"]
    if lost:
        for tensor, copy in zip(live, before, strict=True):
            write_back(tensor, copy)
        raise CheckpointError(
            f"the state_dict of {type(module).__name__} returns copies, and its load_state_dict does not take them "
            f"back: {lost[0]}. Override both, or load {WEIGHTS} by hand."
        )


def _shows(shown: Mapping[str, Tensor], saved: _Saved, name: str) -> bool:
    return name in shown and same_bits(shown[name], saved.like(name, shown[name]))


def _copies(module: nn.Module, wanted: Mapping[str, Tensor]) -> list[str]:
    """Names in the state dict whose memory is not the module's own."""
    own = {place for tensor in all_tensors(module) for place in _places(tensor)}
    return [
        name
        for name, tensor in wanted.items()
        # an empty tensor has no memory that could be compared
        if tensor.numel() and not _is_extra_state(name) and not own.issuperset(_places(tensor))
    ]


def _places(tensor: Tensor) -> Iterator[int]:
    own = tensor if is_lazy(tensor) else local(tensor)
    if is_lazy(own) or is_traceable_wrapper_subclass(own) or own.is_nested or own.layout != torch.strided:
        return
    if own.numel():  # a rank may hold nothing of a parameter
        yield own.untyped_storage().data_ptr()


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA_STATE


def _modules_by_extra_state(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    paths = ((f"{path}." if path else "", part) for path, part in module.named_modules())
    return {plain_name(f"{path}{EXTRA_STATE}").removeprefix(prefix): part for path, part in paths}


def _refuse_damaged(folder: Path, files: Mapping[str, list[int]]) -> None:
    for name, written in files.items():
        # the size first: a checksum reads the whole file
        num_bytes = (folder / name).stat().st_size
        if num_bytes != written[0] or whole_weights.checksums(folder, [name])[name] != written:
            raise CheckpointError(
                f"{folder / name} is damaged: it is not, byte for byte, the file of {written[0]} bytes that was saved "
                f"({num_bytes} are there). Copy the folder again from where it is whole."
            )


def _refuse_other_model(folder: Path, module: nn.Module, wanted: Mapping[str, Tensor], saved: _Saved) -> None:
    stored = saved.stored() | set(saved.ties)
    problems = [f"missing in the file: {name}" for name in sorted(wanted.keys() - stored)]
    problems += [f"not in the model: {name}" for name in sorted(stored - wanted.keys())]
    for name in sorted(saved.stored() & wanted.keys()):
        if _is_extra_state(name):
            continue  # its module says what it takes
        tensor = wanted[name]
        if is_lazy(tensor) or tensor.is_meta:
            problems.append(f"{name} has no memory here: {'run a batch' if is_lazy(tensor) else 'to_empty()'} first")
        elif (there := saved.kind(name)) != (here := saved.kind_of(name, tensor)):
            problems.append(f"{name}: {there[1]} {there[0]} in the file, {here[1]} {here[0]} here")
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        remedy = _which_module(folder, module, wanted, saved) or (
            "Build the model with the configuration and dtype it was trained with."
        )
        raise CheckpointError(
            f"{folder} does not fit {type(module).__name__}: {'; '.join(problems[:_LISTED])}{more}. {remedy}"
        )


def _which_module(folder: Path, module: nn.Module, wanted: Mapping[str, Tensor], saved: _Saved) -> str:
    """What to load instead, where one side is a part of the other; empty: neither is."""
    stored = {name: saved.kind(saved.ties.get(name, name)) for name in saved.stored() | set(saved.ties)}
    here = {name: saved.kind_of(name, tensor) for name, tensor in wanted.items() if not is_lazy(tensor)}
    # by shapes too: every model has a `weight` and a `bias` somewhere
    if path := _path_of_part(stored, here):
        return f"{folder} is of a module that has this one as {path!r}: load it into that module."
    if path := _path_of_part(here, stored):
        return f"{folder} is of the part {path!r} alone: load it into module.get_submodule({path!r})."
    return ""


def _path_of_part(whole: Mapping[str, object], part: Mapping[str, object]) -> str:
    """Below which path one model has all that another is; empty: nowhere, or it is that one itself."""
    some = min(part, default="")
    paths = (name.removesuffix(f".{some}") for name in sorted(whole) if some and name.endswith(f".{some}"))
    return next(
        (path for path in paths if {f"{path}.{key}": kind for key, kind in part.items()}.items() <= whole.items()), ""
    )
