"""The suite's optimizers by name. Knows neither what is trained nor how long."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Recipe(Protocol):
    """What is read of a run."""

    @property
    def optimizer(self) -> str:
        """Its name."""

    @property
    def peak_lr(self) -> float:
        """Learning rate where the schedule is 1."""

    @property
    def weight_decay(self) -> float:
        """Decoupled but for SGD."""


def make_optimizer(setup: Recipe, module: torch.nn.Module) -> torch.optim.Optimizer:
    """The setup's optimizer over all parameters of the module."""
    lr, decay = setup.peak_lr, setup.weight_decay
    if setup.optimizer == "sgd":
        return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    if setup.optimizer == "adafactor":
        return torch.optim.Adafactor(module.parameters(), lr=lr, weight_decay=decay)
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    named = dict(module.named_parameters())
    matrices = [value for name, value in named.items() if value.ndim == 2 and "embed" not in name]
    chosen = {id(value) for value in matrices}
    others = [value for value in named.values() if id(value) not in chosen]
    # AdamW's rate a third of Muon's, as in the usual recipes
    return MuonWithAdamW(
        torch.optim.Muon(matrices, lr=lr, weight_decay=decay),
        torch.optim.AdamW(others, lr=lr / 3, betas=(0.9, 0.95), weight_decay=decay, fused=True),
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that step as one, as Muon is used: it takes matrices, AdamW takes all else."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self._parts = [muon, adamw]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with WideProducts():
            for part in self._parts:
                part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        # a scheduler writes rates into these very dictionaries
        self.param_groups = [group for part in self._parts for group in part.param_groups]


class WideProducts(TorchFunctionMode):
    """Products of matrices in bfloat16 by float32 products, rounded to bfloat16 once: what the format defines.

    Muon asks for them. A host without instructions for bfloat16 takes 7 times as long for the same products, which
    differ from these in the order of their sums at most.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in _PRODUCTS or not all(_is_half(value) for value in args):
            return func(*args, **given)
        return func(*(value.float() for value in args), **given).bfloat16()


_PRODUCTS = {torch.matmul, torch.addmm, Tensor.matmul, Tensor.__matmul__}


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
