"""Metrics that ranks measured on their parts of the data, made into those of all data, in one exchange.

This module knows numbers and how they add up. It knows no loops and no models.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pretrain_merge.runtime import ranks

How = Literal["mean", "sum", "max", "min"]


class Part(NamedTuple):
    """One rank's share of a metric.

    Attributes:
        value: What this rank found.
        weight: For a mean, the size of what it was found on; for a sum, the share that counts, below 1 where several
            ranks read the same data.
        how: How the parts of all ranks make one number.
    """

    value: float
    weight: float = 1.0
    how: How = "mean"


def over_ranks(parts: Mapping[str, Part]) -> dict[str, float]:
    """The metrics of all ranks' data, the same on every rank; those that one rank alone has are its own.

    Sums are made in float64 in the order of ranks, so all ranks get the same bits. A mean of equal numbers is that very
    number, whatever the weights. Every rank must call it at the same point.
    """
    of_ranks = ranks.gather(dict(parts))
    names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
    return {name: _reduced([of_rank[name] for of_rank in of_ranks if name in of_rank]) for name in names}


def _reduced(parts: list[Part]) -> float:
    values, how = [part.value for part in parts], parts[0].how
    if len(parts) == 1 or (how == "mean" and all(value == values[0] for value in values)):
        return values[0]
    if how in ("max", "min"):
        chosen = max(values) if how == "max" else min(values)
        return math.nan if any(map(math.isnan, values)) else chosen
    total = sum(part.value * part.weight for part in parts)
    return total if how == "sum" else total / sum(part.weight for part in parts)
