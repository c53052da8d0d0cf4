"""The running sum behind `average: block`: the models sampled inside one interval, added up in place in float32.

This module knows tensors and how many were added. Which interval is open, and when it ends, is the caller's business.
Means of blocks remove the 1/N noise floor of a merge of N single snapshots, for one accumulator.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pretrain_merge.accumulate import weighted_sum_


class BlockMean:
    """Sum of the models sampled since the last restart.

    Args:
        sample_every: Steps between the models that are added; steps are those of the run, so a resumed run samples the
            same ones.
    """

    def __init__(self, sample_every: int) -> None:
        self._sample_every = sample_every
        self._complete = True
        self._num_seen = 0
        self.num_samples = 0
        self.sums: list[Tensor] = []

    @property
    def is_whole(self) -> bool:
        """Whether the interval was seen from its start without a break, and something was sampled in it."""
        return self._complete and self.num_samples > 0

    @property
    def is_spoiled(self) -> bool:
        """Whether the open interval can no longer give a mean."""
        return not self._complete

    def sample(self, step: int, live: Callable[[], Mapping[str, Tensor]]) -> None:
        """Add the live model if this step is due; `live` is only called then."""
        self._num_seen += 1
        if step % self._sample_every or not self._complete:
            return
        tensors = list(live().values())
        if self.num_samples == 0:
            if not self._fits(tensors):
                self.sums = [torch.empty_like(tensor, dtype=_accumulator_dtype(tensor)) for tensor in tensors]
            weighted_sum_(self.sums, [tensors], [1.0])
        elif not self._fits(tensors):
            self.spoil()
            return
        else:
            weighted_sum_(self.sums, [self.sums, tensors], [1.0, 1.0])
        self.num_samples += 1

    def mean(self) -> list[Tensor]:
        """The mean of the samples in float32, made in place of their sum; the interval must restart afterwards."""
        weighted_sum_(self.sums, [self.sums], [1.0 / self.num_samples])
        return self.sums

    def spoil(self) -> None:
        """A break: the open interval can no longer give a mean, unless none of its models was seen yet."""
        self._complete = self._complete and self._num_seen == 0

    def skip(self) -> None:
        """Steps went by that were not seen, so the open interval is not whole."""
        self._complete = False

    def restart(self) -> None:
        """A new interval begins."""
        self._num_seen = self.num_samples = 0
        self._complete = True

    def _fits(self, tensors: Sequence[Tensor]) -> bool:
        shapes = [(total.shape, total.device) for total in self.sums]
        return bool(self.sums) and shapes == [(tensor.shape, tensor.device) for tensor in tensors]


def _accumulator_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
