"""When a loss spike began, from the training loss and, where it is known, the norm of the gradient.

This module knows numbers of steps and nothing of windows, models or trainers. A step is judged by the steps before it:
its distance from their median, in units of their median absolute deviation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.runtime import ranks

_MAD_OF_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_LEAST_SCALE = 1e-3  # of the median loss, and in log norm: a set-up without noise must not take rounding for a spike
_AT_ONCE = 50  # steps, no more than `calm`; what is seen does not depend on it
_LOSS, _NORM = 0, 1


@dataclass(frozen=True)
class Onset:
    """A spike that was seen.

    Attributes:
        step: The first step that was out of bounds.
        last: The newest step that was; while the spike lasts, each read tells of the same `step` and a later `last`.
        reason: What was out of bounds, for a message.
    """

    step: int
    last: int
    reason: str


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
        self._unread: list[tuple[int, Tensor | None, Tensor | None]] = []
        self.restart()

    def restart(self) -> None:
        """Forget all steps, as where the data changed: no earlier loss says what to expect."""
        # judged already; the first of the newest `within` steps needs `lag` and `history` before it
        self._known = torch.full((self._history + self._lag + self._within - 1, 2), math.nan, dtype=torch.float64)
        self._ahead = self._known[:0]  # on the host, not judged yet
        self._unread.clear()
        self._onset: Onset | None = None

    def observe(self, step: int, loss: Tensor | None, gradient_norm: Tensor | None = None) -> None:
        """Note what a step gave, without waiting for the device.

        Args:
            step: Its number; every rank tells of every step, one after another.
            loss: Training loss of this rank, one number of any floating dtype on any device; None: there was none.
            gradient_norm: Norm of the gradient before clipping, likewise; None: not known.
        """
        # copies: a compiled step may write its next loss into the same memory
        loss, norm = (None if value is None else value.detach().clone() for value in (loss, gradient_norm))
        self._unread.append((step, loss, norm))

    def read(self, step: int) -> Onset | None:
        """Judge the steps since the last read; waits for the device once, and all ranks meet here.

        What is seen does not depend on how often this is called, as long as that is every `calm` steps.

        Args:
            step: The newest step that was observed.

        Returns:
            The spike that one of these steps belongs to; None: all of them were within bounds.

        Raises:
            RankError: Another rank failed before it came here.
        """
        self._fetch()
        before = self._onset
        known = torch.cat([self._known, self._ahead])
        first = step - len(self._ahead) + 1
        for index in self._spikes(known):
            self._onset = self._with(first + index, known[index : index + self._history + self._lag + self._within])
        self._known, self._ahead = known[len(self._ahead) :], self._ahead[:0]
        return self._onset if self._onset is not before else None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to see what this one will see: numbers, and lists of them. All ranks meet."""
        self._fetch()
        return {
            "known": self._known.tolist(),
            "ahead": self._ahead.tolist(),
            "onset": None if self._onset is None else asdict(self._onset),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another run was; what this one observed so far is forgotten."""
        self.restart()
        self._known, self._ahead = (
            torch.tensor(state_dict[name], dtype=torch.float64).reshape(-1, 2) for name in ("known", "ahead")
        )
        self._onset = None if state_dict["onset"] is None else Onset(**state_dict["onset"])

    def _fetch(self) -> None:
        """What was observed since the last time, as the mean over ranks, to the host."""
        if self._unread:
            columns = [[loss for _, loss, _ in self._unread], [norm for _, _, norm in self._unread]]
            self._ahead = torch.cat([self._ahead, _means_over_ranks(columns)])
            self._unread.clear()

    def _spikes(self, known: Tensor) -> list[int]:
        """Which of the steps that are not judged yet belong to a spike, counted from the first of them."""
        rows = self._history + self._lag
        z = self._robust_z(known)  # from the step `within - 1` before the first on
        newest = z.unfold(0, self._within, 1)  # (step, 2, within)
        out = newest > self._threshold
        enough = (out[:, _LOSS].sum(dim=-1) >= self._sustained) & out[:, _LOSS, -1]
        no_norm = newest[:, _NORM].isnan().all(dim=-1)
        spikes = enough & (no_norm | out[:, _NORM].any(dim=-1))
        broken = known[rows + self._within - 1 :, _LOSS] == math.inf
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
            onsets[onset.step] = onset
    return list(onsets.values())


def _means_over_ranks(columns: list[list[Tensor | None]]) -> Tensor:
    """`(step, 2)` in float64: loss and log of the norm; NaN: unknown, infinity: not finite. The same on all ranks."""
    given = [value for column in columns for value in column if value is not None]
    host = iter(torch.stack([value.reshape(()).float() for value in given]).tolist() if given else [])
    values = torch.tensor([[0.0 if value is None else next(host) for value in column] for column in columns])
    present = torch.tensor([[value is not None for value in column] for column in columns])
    sums = ranks.sum_of_floats(
        torch.stack([torch.where(values.isfinite(), values, math.inf).double(), present.double()])
    )
    means = sums[0] / sums[1]  # nobody had one: 0 / 0
    means = torch.where(means.isfinite() | (sums[1] == 0), means, math.inf)
    return torch.stack([means[_LOSS], means[_NORM].log()], dim=1)
