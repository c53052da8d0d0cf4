"""The running sum behind `average: block`: the models sampled inside one interval, added up in place in float32.

This module knows tensors and how many were added. Which interval is open, and when it ends, is the caller's business.
Means of blocks remove the 1/N noise floor of a merge of N single snapshots, for one accumulator.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pretrain_merge.kernels.weighted_sum import weighted_sum_


class BlockMean:
    """Sum of the models sampled since the last restart.

    Args:
        sample_every: Steps between the models that are added; steps are those of the run, so a resumed run samples the
            same ones.
    """

    def __init__(self, sample_every: int) -> None:
        self._sample_every = sample_every
        self._is_valid = True  # of the open interval: no break in it, and no step missed
        self.num_seen = 0
        self.num_samples = 0
        self.names: tuple[str, ...] = ()
        self.sums: list[Tensor] = []

    @property
    def is_complete(self) -> bool:
        """Whether the interval was seen from its start without a break, and something was sampled in it."""
        return self._is_valid and self.num_samples > 0

    @property
    def is_invalid(self) -> bool:
        """Whether the open interval can no longer give a mean."""
        return not self._is_valid

    def samples_at(self, step: int) -> bool:
        """Whether the model of this step is one to add."""
        return step % self._sample_every == 0

    def sample(self, step: int, live: Callable[[], Mapping[str, Tensor]]) -> None:
        """Add the live model if this step is due; `live` is only called then."""
        self.num_seen += 1
        if not self.samples_at(step) or not self._is_valid:
            return
        named = live()
        tensors = list(named.values())
        if self.num_samples == 0:
            if not self._fits(tensors):
                # the memory of the interval before is taken again where it fits: an allocation each would fragment
                self.sums = [torch.empty_like(tensor, dtype=accumulator_dtype(tensor)) for tensor in tensors]
            self.names = tuple(named)
            # the first sample is written, not added: the memory holds the interval before
            weighted_sum_(self.sums, [tensors], [1.0])
        elif self.names != tuple(named) or not self._fits(tensors):
            self.invalidate()  # other parameters train, or they have another shape
            return
        else:
            weighted_sum_(self.sums, [self.sums, tensors], [1.0, 1.0])
        self.num_samples += 1

    def mean(self) -> list[Tensor]:
        """The mean of the samples in float32, made in place of their sum; the interval must restart afterwards."""
        weighted_sum_(self.sums, [self.sums], [1.0 / self.num_samples])
        return self.sums

    def restore(self, num_seen: int, num_samples: int, *, is_valid: bool, sums: Mapping[str, Tensor]) -> None:
        """Continue an interval that another accumulator began.

        Args:
            num_seen: Models that went by in it.
            num_samples: Models that were added.
            is_valid: Whether it can still give a mean.
            sums: By name, on the devices of the live tensors; empty where nothing was added yet.
        """
        self.num_seen, self.num_samples, self._is_valid = num_seen, num_samples, is_valid
        self.names, self.sums = tuple(sums), list(sums.values())

    def invalidate(self) -> None:
        """A break: the open interval can no longer give a mean, unless none of its models was seen yet."""
        # a break at the interval's very start is the start of an interval that is whole
        self._is_valid = self._is_valid and self.num_seen == 0

    def miss(self) -> None:
        """Steps went by that were not seen, so the open interval is not complete."""
        self._is_valid = False

    def restart(self) -> None:
        """A new interval begins."""
        self.num_seen = self.num_samples = 0
        self._is_valid = True

    def clear(self) -> None:
        """A new interval begins, and the memory of the sum is given back."""
        self.restart()
        self.names, self.sums = (), []

    def _fits(self, tensors: Sequence[Tensor]) -> bool:
        shapes = [(total.shape, total.device) for total in self.sums]
        return bool(self.sums) and shapes == [(tensor.shape, tensor.device) for tensor in tensors]


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which models of this tensor's dtype are added up."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
