"""How many elements of a model a rank holds. This module knows shapes and layouts; it knows no tensors and no bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from pretrain_merge.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The trainable parameters of a model.

    Attributes:
        source: Where the shapes come from, in words.
        shapes: One per parameter, tied ones once; a model known by its count only is one column of so many rows.
        activated: Parameters that work on each token: all of them unless experts are routed.
    """

    source: str
    shapes: tuple[Shape, ...]
    activated: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(map(math.prod, self.shapes))

    @property
    def has_experts(self) -> bool:
        """Whether some parameters rest while a token passes."""
        return self.activated < self.total


@dataclass(frozen=True)
class Layout:
    """How ranks divide a model: `shard` x `replicate` x `tensor` of them.

    Attributes:
        shard: Ranks over which FSDP2 divides every parameter.
        replicate: Copies of the whole model: DDP, or the outer dimension of hybrid sharding.
        tensor: Ranks over which tensor parallelism divides every matrix.

    Raises:
        ConfigError: A size is below 1.
    """

    shard: int = 1
    replicate: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 1:
                raise ConfigError(f"{field.name}: {getattr(self, field.name)} ranks. Allowed: 1 or more.")

    @property
    def num_ranks(self) -> int:
        """All ranks."""
        return self.shard * self.replicate * self.tensor

    def elements(self, shapes: Sequence[Shape], rank: int = 0) -> int:
        """Elements that one rank holds.

        FSDP2 cuts the first dimension into `ceil(rows / shard)` rows per rank, so the last ranks may hold fewer rows or
        none, and rank 0 holds the most. Tensor parallelism is taken to cut the first dimension of every matrix too,
        before that; vectors are whole on each of its ranks.

        Args:
            shapes: Parameters of the whole model.
            rank: Position among the `shard` ranks.

        >>> [Layout(shard=2).elements([(5, 3)], rank) for rank in (0, 1)]
        [9, 6]
        """
        return sum(self._elements(shape, rank) for shape in shapes)

    def elements_of_all_ranks(self, shapes: Sequence[Shape]) -> int:
        """Elements that all ranks hold together, replicas counted."""
        # each row is on one of the shards; no loop over ranks, of which somebody may name any number
        sharded = sum(self._rows(shape) * math.prod(shape[1:]) if shape else self.shard for shape in shapes)
        return self.replicate * self.tensor * sharded

    def _elements(self, shape: Shape, rank: int) -> int:
        if not shape:
            return 1
        rows = self._rows(shape)
        own = -(-rows // self.shard)
        return max(0, min(own, rows - rank * own)) * math.prod(shape[1:])

    def _rows(self, shape: Shape) -> int:
        return -(-shape[0] // self.tensor) if len(shape) > 1 else shape[0]
