"""A configuration from a YAML file, which somebody else may have written.

This module knows how a few hundred bytes of YAML become billions of values: a name that stands for a list of names,
each of which stands for a list of names. It knows no keys.
"""

import io
import re
from collections import defaultdict
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from pretrain_merge.files import untrusted

_MOST_BYTES = 2**18  # ten thousand coefficients fit
_MOST_VALUES = 100_000
_MOST_ITEMS = 12_000  # in the file itself; PyYAML reads some ten thousand a second
_MOST_BRACKETS = 500  # and looks ahead for each that is open
_SCALAR_BYTES = 16  # that count as one value
_REFERENCES = re.compile(r"\$\{([^${}]*)")
_KEYS = re.compile(r"\w+")


def load(path: Path) -> DictConfig | ListConfig:
    """What OmegaConf makes of a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than a configuration, also where its names are written out.
        RecursionError: A value contains itself.
        yaml.YAMLError: It is not YAML.
    """
    text = untrusted.read_bytes(path, at_most=_MOST_BYTES).decode("utf-8")
    num_brackets = text.count("[") + text.count("{")
    if num_brackets > _MOST_BRACKETS or text.count(",") + text.count("\n") > _MOST_ITEMS:
        raise ValueError(f"it has more than {_MOST_ITEMS:,} values or {_MOST_BRACKETS} brackets")
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # aliases are one node still, however often they are named
    if root is not None and _Sizes(root).of(root) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values where its aliases are written out")
    return OmegaConf.load(io.StringIO(text))


class _Sizes:
    """How many values each node stands for, with aliases (`*name`) and interpolations (`${key}`) written out."""

    def __init__(self, root: yaml.Node) -> None:
        self._known: dict[int, int] = {}
        self._by_key: dict[str, list[yaml.Node]] = defaultdict(list)
        self._collect(root, set())

    def of(self, node: yaml.Node) -> int:
        if id(node) not in self._known:
            self._known[id(node)] = 0  # one that contains itself: OmegaConf finds that out
            self._known[id(node)] = self._counted(node)
        return self._known[id(node)]

    def _counted(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self.of(key) + self.of(value) for key, value in node.value)
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(map(self.of, node.value))
        named = [key for reference in _REFERENCES.findall(node.value) for key in _KEYS.findall(reference)[-1:]]
        own = 1 + len(node.value) // _SCALAR_BYTES
        # by the last part of its path: which of those that share it is meant is OmegaConf's to say
        return own + sum(max(map(self.of, self._by_key[key]), default=0) for key in named if key in self._by_key)

    def _collect(self, node: yaml.Node, seen: set[int]) -> None:
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return
        seen.add(id(node))
        is_mapping = isinstance(node, yaml.MappingNode)
        items = node.value if is_mapping else ((None, item) for item in node.value)
        for index, (key, value) in enumerate(items):
            self._by_key[key.value if isinstance(key, yaml.ScalarNode) else str(index)].append(value)
            self._collect(value, seen)
