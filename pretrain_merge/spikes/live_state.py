"""What of a run on this rank can be taken back, by name: weights, buffers, scale of the loss, state of optimizers.

This module knows modules, optimizers and shards. It knows no steps and no reason to go back.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_merge.errors import CheckpointError, UnsupportedModelError
from pretrain_merge.parameters import by_plain_name, reshard
from pretrain_merge.parameters.shards import local_part
from pretrain_merge.tensor_names import plain_name

WEIGHT, BUFFER, SCALER, STATE = "weight/", "buffer/", "scaler/", "state/"


class LiveState:
    """The live tensors of one run.

    Args:
        module: The module that trains.
        optimizers: Of the run, in their order.
        with_optimizers: Whether their state is copied and written, too.
        scaler: Of gradients in float16; None: there is none.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[Any], *, with_optimizers: bool, scaler: Any = None
    ) -> None:
        self._module, self._optimizers, self._with_optimizers = module, optimizers, with_optimizers
        self._scaler = scaler
        self._moved: set[str] = set()  # frozen weights that somebody writes into, as an average or a momentum encoder
        self._sums_at_first = self._sums()

    @torch.no_grad()
    def copy(self) -> dict[str, Tensor]:
        """Everything in host memory; of sharded parameters the shards.

        Raises:
            UnsupportedModelError: The state of an optimizer is neither tensors nor numbers.
        """
        reshard(self._module)  # P18: gathered parameters are no shards
        self._moved |= dict(self._sums().items() - self._sums_at_first.items()).keys()
        tensors = {**self._weights(), **self._buffers()}
        copies = {name: local_part(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}  # P23
        copies |= {SCALER + key: _on_host(key, value) for key, value in self._scaling().items()}
        if self._with_optimizers:
            copies |= {name: _on_host(name, state[key]) for name, state, key in self._states()}
        return copies

    @torch.no_grad()
    def write(self, saved: Mapping[str, Tensor]) -> None:
        """Make the run what it was, with the state of its optimizers where that was copied, too."""
        reshard(self._module)
        for name, weight in self._weights().items():
            if name in saved:  # one that was added since (P36) was not trained then
                local_part(weight).copy_(saved[name])
        for name, owner, key in self._places_of_buffers():
            _write_buffer(owner, key, saved.get(name))
        # each NaN has halved it: left so, gradients would be zero in float16 for thousands of steps
        if scaling := {key: saved[SCALER + key].item() for key in self._scaling() if SCALER + key in saved}:
            self._scaler.load_state_dict(self._scaler.state_dict() | scaling)
        for name, state, key in list(self._states()) if self._with_optimizers else ():
            if name not in saved:
                del state[key]
            elif isinstance(state[key], Tensor):
                local_part(state[key]).copy_(saved[name])
            else:
                state[key] = type(state[key])(saved[name].item())

    def begin_optimizers_afresh(self) -> None:
        """Optimizers forget all that they keep of parameters."""
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def refuse_other(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse tensors of another model, before the first of them is needed.

        Raises:
            CheckpointError: A weight is not there, or has another shape.
        """
        # whoever writes into frozen weights may have begun later than the point
        trained = self._trained()
        self._moved |= saved.keys() & self._frozen(trained).keys()
        for name, weight in trained.items():
            here = tuple(local_part(weight).shape)
            there = tuple(saved[name].shape) if name in saved else "missing"
            if here != there:
                raise CheckpointError(
                    f"a restart point in the checkpoint is of another model: {name.removeprefix(WEIGHT)!r} is {here} "
                    f"on this rank, and {there} there. Build the model, and shard it, as it was; or leave the restart "
                    f"points out by SpikeRecovery(in_checkpoints=False)."
                )

    def _weights(self) -> dict[str, Tensor]:
        trained = self._trained()
        return trained | {name: weight for name, weight in self._frozen(trained).items() if name in self._moved}

    def _frozen(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {WEIGHT + plain_name(name): parameter for name, parameter in self._module.named_parameters()}
        return {name: weight for name, weight in named.items() if name not in trained}

    @torch.no_grad()
    def _sums(self) -> dict[str, float]:
        """Of frozen weights, on the host: copies of a large frozen model would cost more than all that trains."""
        plain = {
            name: local_part(weight)
            for name, weight in self._frozen(self._trained()).items()
            # quantised ones have no sum; nobody averages them either
            if weight.is_floating_point() and weight.element_size() > 1
        }
        sums = [part.sum(dtype=torch.float64).cpu() for part in plain.values()]
        return dict(zip(plain, torch.stack(sums).tolist() if sums else [], strict=True))

    def _trained(self) -> dict[str, Tensor]:
        stepped = {id(item) for each in self._optimizers for group in each.param_groups for item in group["params"]}
        trained = by_plain_name(
            (name, parameter)
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad or id(parameter) in stepped  # P36: a GAN freezes one half by turns
        )
        return {WEIGHT + name: parameter for name, parameter in trained}

    def _buffers(self) -> dict[str, Tensor]:
        return dict(by_plain_name((name, owner._buffers[key]) for name, owner, key in self._places_of_buffers()))  # type: ignore[misc]

    def _places_of_buffers(self) -> Iterator[tuple[str, nn.Module, str]]:
        for prefix, part in self._module.named_modules():
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    yield BUFFER + plain_name(f"{prefix}.{key}".lstrip(".")), part, key

    def _scaling(self) -> dict[str, Any]:
        state = self._scaler.state_dict() if self._scaler is not None else {}  # empty where it is disabled
        return {key: state[key] for key in ("scale", "_growth_tracker") if key in state}

    def _states(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Every value that an optimizer keeps of a parameter: a name, and where it is."""
        for index, optimizer in enumerate(self._optimizers):
            parameters = [item for group in optimizer.param_groups for item in group["params"]]
            for place, parameter in enumerate(parameters):
                state = optimizer.state.get(parameter, {})
                for key in [key for key, value in state.items() if value is not None]:
                    yield f"{STATE}{index}/{place}/{key}", state, key


def _on_host(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return local_part(value).detach().to("cpu", copy=True)
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    raise UnsupportedModelError(
        f"an optimizer keeps a {type(value).__name__} ({name.removeprefix(STATE)}), which a restart point cannot hold. "
        f"Allowed: tensors and numbers. Set optimizer='fresh', which needs no state of it."
    )


def _write_buffer(owner: nn.Module, key: str, saved: Tensor | None) -> None:
    live = owner._buffers[key]
    if saved is None or live is None:
        return
    if live.shape == saved.shape and live.layout == saved.layout:
        local_part(live).copy_(saved)
    else:  # one that grows, as a cache
        owner._buffers[key] = saved.to(live.device, copy=True)
