"""Candidates of a sweep in a LightningModule, by `Trainer.validate`: the metrics that a run itself would log.

This module knows modules, state dicts and Trainers. Tensors come mapped from the checkpoints' files, so the system's
page cache is the window: what fits there is read from the disk once, however many merges it is in.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.errors import ConfigError, MergeInputError
from pretrain_merge.offline.agreement import Output
from pretrain_merge.offline.candidates import Bench, Candidate, Measured, numbers
from pretrain_merge.offline.files import Files
from pretrain_merge.offline.mapped import MappedTensors
from pretrain_merge.offline.sums import Row, sum_rows
from pretrain_merge.offline.tensors import Source
from pretrain_merge.offline.torch_memory import part_of
from pretrain_merge.runtime.random_state import random_state_kept
from pretrain_merge.tensor_names import plain_name

_LISTED = 5
_ONE_PROCESS: Mapping[str, Any] = {
    "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False, "callbacks": [], "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class ModuleBench(Bench):
    """Evaluates candidates in a module, which has the weights of the last one afterwards; use as a context manager.

    Args:
        module: A LightningModule that validates.
        data: Its validation loaders, a LightningDataModule, or None where the module has its own.
        trainer: A Trainer that validates, or options of one that is made: precision, limits.
        outputs: What a merge of the checkpoints has, as was agreed on.
        ties: Other names of tensors in it.
        base: Gives what the checkpoints lack.

    Raises:
        ConfigError: That is not a LightningModule.
    """

    def __init__(
        self, module: Any, data: Any, trainer: Any, outputs: Mapping[str, Output], ties: Mapping[str, str],
        base: Source | None,
    ) -> None:  # fmt: skip
        self._module, self._outputs, self._base = module, outputs, base
        self._known = {name: name for name in outputs} | dict(ties)
        library = _library_of(module)
        self._trainer = library.Trainer(**{**trainer, **_ONE_PROCESS}) if isinstance(trainer, Mapping) else trainer
        # behind the set-up of model and strategy, so that what configure_model() makes is there
        load = type("LoadCandidate", (library.Callback,), {"on_validation_start": lambda *_: self._load()})()
        self._data = {"datamodule" if hasattr(data, "val_dataloader") else "dataloaders": data}
        self._files, self._stack = Files(), ExitStack()
        self._tensors: dict[int, MappedTensors] = {}
        self._names: Mapping[str, str] = {}  # by names of the module, those of the outputs
        self._merged: dict[str, Tensor] = {}  # memory that every candidate uses again
        self._summed: list[str] = []  # outputs that are parameters of the module
        self._candidate = Candidate("", (), ())
        self._spread = math.nan
        self._callbacks = self._trainer.callbacks
        self._callbacks.append(load)
        self._stack.callback(self._callbacks.remove, load)

    def __enter__(self) -> "ModuleBench":
        self._stack.enter_context(self._files)
        self._random_state = self._stack.enter_context(random_state_kept())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, sources: Sequence[Source]) -> None:
        """These checkpoints are needed from now on, and no others."""
        needed = [*sources, *([self._base] if self._base is not None else [])]
        before = self._tensors
        # those that were mapped before stay, so that each is opened once
        self._tensors = {id(item): before.get(id(item)) or MappedTensors(item, self._files) for item in needed}

    def measure(self, candidate: Candidate) -> Measured:
        """Validate with its weights, on the same batches and with the same random numbers as all others (P6)."""
        self._candidate = candidate
        self._random_state()
        self._trainer.validate(self._module, verbose=False, **self._data)
        return Measured(numbers(candidate.label, dict(self._trainer.callback_metrics)), self._spread)

    def spread(self, sources: Sequence[Source]) -> float:
        """Of what the last candidate's parameters were merged from, in memory that the next merge overwrites."""
        return self._sum(sources, [1 / len(sources)] * len(sources))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load(self) -> None:
        state = {plain_name(name): (name, value) for name, value in self._module.state_dict().items()}
        own = {name: value for name, (_, value) in state.items() if isinstance(value, Tensor)}
        if not self._names:
            self._names = _names(own, self._known, self._outputs)
        parameters = {plain_name(name) for name, _ in self._module.named_parameters(remove_duplicate=False)}
        summed = {
            name: there
            for name, there in self._names.items()
            if self._outputs[there].origin is None and name in parameters
        }
        self._summed = list(dict.fromkeys(summed.values()))  # tied tensors once
        is_merge = len(self._candidate.sources) > 1
        self._spread = self._sum(self._candidate.sources, self._candidate.coefficients) if is_merge else math.nan
        values = dict(state.values())
        for name, there in self._names.items():
            # buffers are of the newest, as in a run
            values[state[name][0]] = self._merged[there] if is_merge and name in summed else self._unmerged(there)
        self._module.load_state_dict(values)  # its own method, since its state dict may be of copies

    def _sum(self, sources: Sequence[Source], coefficients: Sequence[float]) -> float:
        """Merge into `_merged`; returns the spread."""
        rows = []
        for there in self._summed:
            parts = [self._tensors[id(source)][there] for source in sources]
            target = self._merged.setdefault(there, torch.empty_like(parts[-1]))
            rows.append(Row(there, part_of(target), [part_of(part) for part in parts]))
        threads = torch.get_num_threads()
        return sum_rows(rows, sources, coefficients, most_threads=threads).relative_rms if rows else math.nan

    def _unmerged(self, name: str) -> Tensor:
        newest = self._candidate.sources[-1]
        has_it = self._base is None or name in newest.tensors or name in newest.ties
        return self._tensors[id(newest if has_it else self._base)][name]


def _names(own: Mapping[str, Tensor], known: Mapping[str, str], outputs: Mapping[str, Output]) -> dict[str, str]:
    """The output for each tensor of a module, which may hold the model under a name of its own.

    Raises:
        MergeInputError: They are of different models.
    """
    prefix = _prefix(own, known)
    inside = [name for name in own if name.startswith(prefix)]
    found = {name: known[there] for name in inside if (there := name.removeprefix(prefix)) in known}
    # what the module ties, and its files hold once, is filled under another name
    filled = {own[name].data_ptr() for name in found}
    problems = [
        f"{name} of the module is in no checkpoint"
        for name in inside
        if name not in found and own[name].data_ptr() not in filled
    ]
    problems += [f"{name} is not in the module" for name in known if f"{prefix}{name}" not in own]
    problems += [
        f"{name} is {outputs[there].kind} in the checkpoints and {tuple(own[name].shape)} in the module"
        for name, there in found.items()
        if tuple(own[name].shape) != outputs[there].kind.shape
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise MergeInputError(
            f"evaluate: the checkpoints do not fit the module: {'; '.join(sorted(problems)[:_LISTED])}{more}. Build it "
            f"as it was trained, or name with base a checkpoint that has what these lack."
        )
    return found


def _prefix(own: Mapping[str, Tensor], known: Mapping[str, str]) -> str:
    """What a module puts before the names of the model that it trains; empty where the checkpoints have that too."""
    some = next(iter(known))
    for name in sorted(own, key=len):
        prefix = name.removesuffix(some)
        if name.endswith(some) and all(f"{prefix}{other}" in own for other in known):
            return prefix
    return ""


def _library_of(module: Any) -> Any:
    """The one of Lightning's two packages whose module it is; whoever made one has imported it."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        library = sys.modules.get(name)
        if library is not None and isinstance(module, library.LightningModule):
            return library
    raise ConfigError(
        f"evaluate: {type(module).__name__} is not a LightningModule. Give one and its validation loaders, or a "
        f"function of a folder."
    )
