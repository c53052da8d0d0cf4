"""Which interval and window the PMA paper used for models of a size. A look-up, no law: its rows are no power law.

This module knows the paper's rows and how to read between them; it knows no memory and no times.
"""

import itertools
import math
from dataclasses import dataclass

SOURCE = "PMA, arXiv 2505.12082"
WINDOW = 10  # the paper's own default, where a row names no other


@dataclass(frozen=True)
class Row:
    """One model of the paper.

    Attributes:
        name: As in the paper; a mixture of experts is named by activated and total parameters.
        parameters: Total of a dense model, activated ones of a mixture of experts.
        interval: Tokens between two snapshots.
        window: Snapshots merged.
    """

    name: str
    parameters: float
    interval: float
    window: int = WINDOW


DENSE = (
    Row("411M", 411e6, 2e9),
    Row("2B", 2e9, 5e9, window=6),
    Row("8B", 8e9, 15e9),
    Row("70B", 70e9, 40e9),
)
MIXTURES = (
    Row("0.7B/7B", 0.7e9, 4e9),
    Row("1.3B/13B", 1.3e9, 8e9),
    Row("10B/100B", 10e9, 80e9),
)


@dataclass(frozen=True)
class Advice:
    """What the paper used for a model of some size.

    Attributes:
        interval: Tokens between two snapshots.
        window: Snapshots merged, of the nearest row.
        how: How the interval was read off, with the source.
    """

    interval: int
    window: int
    how: str


def used_for(activated: float, *, has_experts: bool) -> Advice:
    """The paper's interval and window for a model of this size.

    Between two rows the interval is interpolated, a straight line in the logarithms of size and interval; beyond the
    first or the last row it is that row's. A mixture of experts is looked up by its activated parameters.

    Args:
        activated: Parameters that work on each token; all of them in a dense model.
        has_experts: Whether to read the rows of mixtures of experts.

    Source: PMA (arXiv 2505.12082), the intervals and windows of its experiments.

    >>> used_for(70e9, has_experts=False)
    Advice(interval=40000000000, window=10, how='dense 70B of PMA, arXiv 2505.12082')
    >>> used_for(4e9, has_experts=False).how
    'interpolated between dense 2B and 8B of PMA, arXiv 2505.12082'
    """
    rows, kind = (MIXTURES, "mixture") if has_experts else (DENSE, "dense")
    nearest = min(rows, key=lambda row: abs(math.log(row.parameters / activated)))
    for row in rows:
        if math.isclose(row.parameters, activated, rel_tol=1e-9):
            return Advice(int(row.interval), row.window, f"{kind} {row.name} of {SOURCE}")
    if not rows[0].parameters < activated < rows[-1].parameters:
        how = f"beyond the rows of {SOURCE}: that of its nearest, {kind} {nearest.name}"
        return Advice(int(nearest.interval), nearest.window, how)
    below, above = next(
        pair for pair in itertools.pairwise(rows) if pair[0].parameters < activated < pair[1].parameters
    )
    position = math.log(activated / below.parameters) / math.log(above.parameters / below.parameters)
    interval = below.interval * (above.interval / below.interval) ** position
    how = f"interpolated between {kind} {below.name} and {above.name} of {SOURCE}"
    return Advice(_two_digits(interval), nearest.window, how)


def _two_digits(value: float) -> int:
    """Rounded, since two rows give no more than that."""
    unit: int = 10 ** (math.floor(math.log10(value)) - 1)
    return round(value / unit) * unit
