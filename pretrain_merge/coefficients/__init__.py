"""How much each snapshot counts in a merge: coefficients, oldest to newest, in float64, summing to 1.

A merge is a weighted sum of snapshots, ``sum_j c_j theta_j``. This module computes the ``c_j`` and nothing else. It
knows no tensors and no storage, and of the snapshots only how many there are and when they were taken.

The same numbers can be read as a learning-rate decay. Snapshot j is the oldest one plus the updates ``g_1, ..., g_j``
of the intervals between; so in the merge, update ``g_i`` is left with the factor ``w_i = c_i + c_(i+1) + ...``, as if
its learning rate had been cut to that fraction (WSM, arXiv 2507.17634, theorem 3.1). `decay` goes from the rates to the
coefficients, `decay_curve` back:

>>> decay_curve(sma(4))  # averaging four snapshots is a linear decay
(0.75, 0.5, 0.25)
>>> [round(c, 3) for c in decay(5, shape="1-sqrt")]  # a decay that falls fast at first leans on the oldest
[0.447, 0.185, 0.142, 0.12, 0.106]

A new kind of coefficients is one function under `@kind`, in `means` or `replays`; `compute` and the configuration then
know its name.
"""

from pretrain_merge.coefficients.means import custom, ema, extrapolated, power, sma, wma
from pretrain_merge.coefficients.numbers import SUM_TOLERANCE
from pretrain_merge.coefficients.readings import decay_curve, mean_age, n_eff
from pretrain_merge.coefficients.registry import KINDS, Coefficients, compute, kind
from pretrain_merge.coefficients.replays import decay, qam

__all__ = [
    "KINDS",
    "SUM_TOLERANCE",
    "Coefficients",
    "compute",
    "custom",
    "decay",
    "decay_curve",
    "ema",
    "extrapolated",
    "kind",
    "mean_age",
    "n_eff",
    "power",
    "qam",
    "sma",
    "wma",
]
