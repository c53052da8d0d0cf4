"""Whether a metric is better the smaller or the larger it is. This module knows names of metrics."""

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
