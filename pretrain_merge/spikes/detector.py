"""When a loss spike began, from the training loss and, where it is known, the norm of the gradient.

This module knows numbers of steps and nothing of windows, models or trainers. A step is judged by the steps before it:
its distance from their median, in units of their median absolute deviation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.runtime import ranks

_MAD_OF_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_LEAST_SCALE = 1e-3  # of the median loss, and in log norm: a set-up without noise must not take rounding for a spike
_AT_ONCE = 50  # steps, no more than `calm`; what is seen does not depend on it
_LOSS, _NORM = 0, 1
_Given = tuple[Tensor | None, Tensor | None]  # loss and norm of a step on this rank


@dataclass(frozen=True)
class Onset:
    """A spike that was seen.

    Attributes:
        step: The first step that was out of bounds.
        last: The newest step that was; while the spike lasts, each read tells of the same `step` and a later `last`.
        reason: What was out of bounds, for a message.
        is_new: Whether this read is the first that tells of it.
    """

    step: int
    last: int
    reason: str
    is_new: bool = True


class SpikeDetector:
    """Tells where the loss left what the steps before led to expect, with all ranks of one mind.

    A step is out of bounds where its robust z, `(x - median) / (1.4826 MAD)` over `history` steps before it, is beyond
    `threshold`. A spike is seen where the loss was so in `sustained` of `within` steps and, where gradient norms are
    known, the log of the norm was so in one of them. A loss of NaN or infinity is a spike at once.

    Args:
        history: Steps that median and MAD are taken over.
        lag: Newest steps left out of them, so that a spike is not judged by itself.
        fewest: Steps that must be known of `history` before a finite loss is judged.
        threshold: Robust z from which a step is out of bounds.
        sustained: Steps out of bounds that make a spike, of `within`.
        within: See `sustained`.
        calm: Steps without a spike after which the next is another one.
    """

    def __init__(
        self,
        *,
        history: int = 200,
        lag: int = 10,
        fewest: int = 50,
        threshold: float = 3.0,
        sustained: int = 3,
        within: int = 5,
        calm: int = 50,
    ) -> None:
        self._history, self._lag, self._fewest = history, lag, fewest
        self._threshold, self._sustained, self._within, self._calm = threshold, sustained, within, calm
        self._num_kept = history + lag + within - 1
        self._unread: list[_Given] = []
        self.restart()

    def restart(self) -> None:
        """Forget all steps, as where the data changed: no earlier loss says what to expect."""
        # judged already; the first of the newest `within` steps needs `lag` and `history` before it
        self._known = torch.full((self._num_kept, 2), math.nan, dtype=torch.float64)
        self._ahead = self._known[:0]  # on the host, not judged yet
        self._unread.clear()
        self._newest: int | None = None  # step of the last row of all these
        self._onset: Onset | None = None

    def observe(self, step: int, loss: Tensor | None, gradient_norm: Tensor | None = None) -> None:
        """Note what a step gave, without waiting for the device.

        Args:
            step: Its number; steps that are left out count as ones of which nothing is known.
            loss: Training loss of this rank, one number of any floating dtype on any device; None: there was none.
            gradient_norm: Norm of the gradient before clipping, likewise; None: not known.
        """
        self._skip_to(step - 1)
        # copies: a compiled step may write its next loss into the same memory
        loss, norm = (None if value is None else value.detach().clone() for value in (loss, gradient_norm))
        self._unread.append((loss, norm))
        self._newest = step

    def read(self, step: int) -> Onset | None:
        """Judge the steps since the last read; waits for the device once, and all ranks meet here.

        What is seen does not depend on how often this is called, as long as that is every `calm` steps.

        Args:
            step: The newest step; every rank reads at the same ones.

        Returns:
            The spike that one of these steps belongs to; None: all of them were within bounds.

        Raises:
            RankError: Another rank failed before it came here.
        """
        self._skip_to(step)
        self.fetch()
        before = self._onset
        known = torch.cat([self._known, self._ahead])
        first = step - len(self._ahead) + 1
        for index in self._spikes(known):
            self._onset = self._with(first + index, known[index : index + self._num_kept + 1])
        self._known, self._ahead = known[len(self._ahead) :], self._ahead[:0]
        if self._onset is None or self._onset is before:
            return None
        return replace(self._onset, is_new=before is None or before.step != self._onset.step)

    def fetch(self) -> None:
        """Bring what was observed to the host, as the mean over ranks; judges nothing. All ranks meet here.

        Raises:
            RankError: Another rank failed before it came here.
        """
        if self._unread:
            self._ahead = torch.cat([self._ahead, _means(self._unread, ranks.sum_of_floats)])
            self._unread.clear()

    def state_dict(self, *, meet: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to see what this one will see: numbers, and lists of them.

        Args:
            meet: `fetch` first, as all ranks must. Else what was not fetched is taken for the mean over ranks.
        """
        if meet:
            self.fetch()
        unread = _means(self._unread, lambda sums: sums) if self._unread else self._ahead[:0]
        num_unknown = int((~self._known.isnan().all(dim=1)).cumsum(0).eq(0).sum())
        return {
            "known": self._known[num_unknown:].tolist(),
            "ahead": torch.cat([self._ahead, unread]).tolist(),
            "newest": self._newest,
            "onset": None if self._onset is None else asdict(self._onset),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another run was; what this one observed so far is forgotten."""
        self.restart()
        known, self._ahead = (
            torch.tensor(state_dict[name], dtype=torch.float64).reshape(-1, 2) for name in ("known", "ahead")
        )
        self._known[self._num_kept - len(known) :] = known
        self._newest = state_dict["newest"]
        self._onset = None if state_dict["onset"] is None else Onset(**state_dict["onset"])

    def _skip_to(self, step: int) -> None:
        """Steps up to this one that nobody observed."""
        if self._newest is not None and step > self._newest:
            self._unread += [(None, None)] * min(step - self._newest, self._num_kept)
        self._newest = step

    def _spikes(self, known: Tensor) -> list[int]:
        """Which of the steps that are not judged yet belong to a spike, counted from the first of them."""
        z = self._robust_z(known)  # from the step `within - 1` before the first on
        newest = z.unfold(0, self._within, 1)  # (step, 2, within)
        out = newest > self._threshold
        enough = (out[:, _LOSS].sum(dim=-1) >= self._sustained) & out[:, _LOSS, -1]
        no_norm = newest[:, _NORM].isnan().all(dim=-1)
        spikes = enough & (no_norm | out[:, _NORM].any(dim=-1))
        broken = known[self._num_kept :, _LOSS] == math.inf
        return [int(index) for index in (spikes | broken).nonzero()]

    def _robust_z(self, known: Tensor) -> Tensor:
        """`(step, 2)`: how far each step beyond the first `history + lag` lies from them; NaN: not judged."""
        num_steps = len(known) - self._history - self._lag
        before = known.unfold(0, self._history, 1)[:num_steps]  # (step, 2, history)
        median = before.nanmedian(dim=-1, keepdim=True).values
        mad = (before - median).abs().nanmedian(dim=-1).values
        median = median.squeeze(-1)
        least = torch.stack([_LEAST_SCALE * median[:, _LOSS].abs(), torch.full_like(median[:, _NORM], _LEAST_SCALE)], 1)
        z = (known[-num_steps:] - median) / torch.maximum(_MAD_OF_NORMAL * mad, least).clamp(min=1e-30)
        return torch.where(before.isfinite().sum(dim=-1) >= self._fewest, z, math.nan)

    def _with(self, step: int, known: Tensor) -> Onset:
        """The spike so far, with this step of it."""
        if self._onset is not None and step - self._onset.last <= self._calm:
            return replace(self._onset, last=step)
        loss = float(known[-1, _LOSS])
        if loss == math.inf:
            return Onset(step, step, "the training loss is NaN or infinite")
        out = (self._robust_z(known)[:, _LOSS] > self._threshold).nonzero()
        median = float(known[: self._history, _LOSS].nanmedian())
        return Onset(
            step - (self._within - 1) + int(out[0]), step, f"the training loss rose to {loss:.3g} from {median:.3g}"
        )


def find_onsets(
    loss: Sequence[float], gradient_norm: Sequence[float] | None = None, *, first_step: int = 1, **settings: Any
) -> list[Onset]:
    """The spikes in a whole run, as a `SpikeDetector` that reads after every step would see them.

    Args:
        loss: Training loss of each step.
        gradient_norm: Norm of the gradient of each, before clipping; None: not known.
        first_step: Number of the first.
        settings: Those of `SpikeDetector`.
    """
    detector, onsets = SpikeDetector(**settings), dict[int, Onset]()
    norms = [None] * len(loss) if gradient_norm is None else [torch.tensor(value) for value in gradient_norm]
    for step, (value, norm) in enumerate(zip(loss, norms, strict=True), start=first_step):
        detector.observe(step, torch.tensor(value), norm)
        is_read = step % _AT_ONCE == 0 or step == first_step + len(loss) - 1
        if is_read and (onset := detector.read(step)) is not None:
            onsets[onset.step] = replace(onset, is_new=True)
    return list(onsets.values())


def _means(given: list[_Given], sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """`(step, 2)` in float64: loss and log of the norm; NaN: unknown, infinity: not finite. The same on all ranks."""
    columns = [[step[column] for step in given] for column in (_LOSS, _NORM)]
    tensors = [value for column in columns for value in column if value is not None]
    # one copy to the host, which waits for the device
    host = iter(_on_host(tensors) if tensors else [])
    values = torch.tensor([[0.0 if value is None else next(host) for value in column] for column in columns])
    present = torch.tensor([[value is not None for value in column] for column in columns])
    finite = torch.where(values.isfinite(), values, math.inf)
    sums = sum_over_ranks(torch.stack([finite.double(), present.double()]))
    means = sums[0] / sums[1]  # nobody had one: 0 / 0
    means = torch.where(means.isfinite() | (sums[1] == 0), means, math.inf)
    return torch.stack([means[_LOSS], means[_NORM].log()], dim=1)


def _on_host(values: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack(
        [value.reshape(()).to(values[0].device, torch.float32) for value in values]
    ).tolist()
    return numbers
