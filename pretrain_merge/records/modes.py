"""Whether a metric is better the smaller or the larger it is, and how far it is from raw. Knows names of metrics."""

import math
import re
from typing import Literal

Mode = Literal["min", "max"]

_LARGER_IS_BETTER = re.compile(
    r"(^|[^a-z])(acc|accuracy|f1|auc|auroc|bleu|rouge|score|em|recall|precision|map|reward)([^a-z]|$)", re.IGNORECASE
)


def mode_of(metric: str) -> Mode:
    """Whether the smallest value of a metric is the best or the largest, by its name.

    >>> mode_of("val_loss"), mode_of("val_acc")
    ('min', 'max')
    """
    # by words: an unknown metric is taken for a loss, which most are
    return "max" if _LARGER_IS_BETTER.search(metric) else "min"


def is_better(value: float, than: float, mode: Mode) -> bool:
    """Whether a value is as good or better; NaN is not."""
    # as good counts: a view that equals raw is not worse
    return value <= than if mode == "min" else value >= than


def change(value: float, raw: float) -> float | None:
    """How far a value is above raw, as a share of raw's size; None: there is no such share.

    >>> change(1.5, 2.0), change(-2.5, -2.0), change(1.0, 0.0)
    (-0.25, -0.25, None)
    """
    # by its size: a metric below 0 that falls has fallen
    share = (value - raw) / abs(raw) if raw else math.nan
    return share if math.isfinite(share) else None  # nor is there one of a raw so small that the quotient overflows
