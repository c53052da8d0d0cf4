"""Several modules as one: pipeline stages of one model, or models that train together.

This module knows names of modules. It knows nothing of which tensors are merged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from pretrain_merge.errors import UnsupportedModelError
from pretrain_merge.parameters.shards import unwrapped
from pretrain_merge.tensor_names import plain_name

Modules = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


class SeveralModules(nn.Module):
    """Modules under one root, as far as names, parameters and buffers go; it has no forward and owns nothing.

    Args:
        parts: The modules, each with the prefix of its names; several may share the empty one.
    """

    def __init__(self, parts: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._parts = parts  # a list: registered as submodules, two could not share a prefix

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """What all else of a module (`parameters`, `named_buffers`, …) is made of."""
        memo = set() if memo is None else memo
        for name, part in self._parts:
            yield from part.named_modules(memo, ".".join(filter(None, (prefix, name))), remove_duplicate)


class Given:
    """Modules as a loop passes them at every step; several are made one when they are others than the last time.

    Attributes:
        one: The last; None before the first.
    """

    def __init__(self) -> None:
        self.one: nn.Module | None = None
        self._parts: list[object] = []  # kept, so that an address names the same module as long as it is compared
        self._key: list[object] = []

    def as_one(self, modules: Modules) -> nn.Module:
        """As the function of this name, without a walk through all names at every step."""
        if isinstance(modules, nn.Module):
            self.one, self._key = modules, []
            return modules
        named = modules.items() if isinstance(modules, Mapping) else enumerate(modules)
        key: list[object] = [(name, id(part)) for name, part in named]
        if self.one is None or key != self._key:
            self.one, self._key = as_one(modules), key
            self._parts = list(modules.values() if isinstance(modules, Mapping) else modules)
        return self.one


def as_one(modules: Modules) -> nn.Module:
    """One module that has the parameters and buffers of several; a module itself as it is.

    Args:
        modules: A module; a mapping, whose keys come in front of names; or a sequence, whose names stay as they are
            where no two parts share one (pipeline stages), and else get their position in front.

    Raises:
        UnsupportedModelError: It holds something else than modules, or nothing.
    """
    if isinstance(modules, nn.Module):
        return modules
    parts: list[tuple[Any, Any]] = []
    if isinstance(modules, Mapping):
        parts = list(modules.items())
    elif isinstance(modules, Sequence):
        parts = [("", part) for part in modules]
    if not parts or not all(isinstance(name, str) and isinstance(part, nn.Module) for name, part in parts):
        raise UnsupportedModelError(
            f"{type(modules).__name__} {modules!r:.80} is not a module. Allowed: a module, or a sequence of modules or "
            f"a mapping from names to modules, of one or more. Pass the modules themselves."
        )
    parts = [(name, unwrapped(part)) for name, part in parts]
    names = [name for _, part in parts for name in _names(part)]
    if not isinstance(modules, Mapping) and len(set(names)) < len(names):
        parts = [(str(position), part) for position, (_, part) in enumerate(parts)]
    return SeveralModules(parts)


def _names(part: nn.Module) -> Iterator[str]:
    """Of its parameters and of the buffers that are saved: stages may each have a table of sines of their own."""
    for prefix, module in part.named_modules(remove_duplicate=False):
        saved = (key for key in module._buffers if key not in module._non_persistent_buffers_set)
        yield from (plain_name(f"{prefix}.{key}") for key in (*module._parameters, *saved))
