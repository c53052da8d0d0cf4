"""When a loss spike began, from the training loss and, where it is known, the norm of the gradient.

This module knows numbers of steps and nothing of windows, models or trainers. A step is judged by the steps before it:
its distance from their median, in units of their median absolute deviation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from pretrain_merge.runtime import ranks

_MAD_OF_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_LEAST_SCALE = 1e-3  # of the median loss, and in log norm: a set-up without noise must not take rounding for a spike
# Steps between two reads of a run: each waits for the device and for all ranks, and a collapse shall be known within 15
# steps of its begin.
READ_EVERY = 10
_AT_ONCE = 50  # steps, no more than `calm`; what is seen does not depend on it
_LOSS, _NORM = 0, 1
_Floats = NDArray[np.float64]
_Number = Tensor | float
_Given = list[_Number | None]  # loss and norm of a step on this rank


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
        self._known: _Floats = np.full((self._num_kept, 2), math.nan)
        self._ahead = self._known[:0]  # on the host, not judged yet
        self._unread.clear()
        self._newest: int | None = None  # step of the last row of all these
        self._onset: Onset | None = None

    def observe(self, step: int, loss: _Number | None, gradient_norm: _Number | None = None) -> None:
        """Note what a step gave, without waiting for the device.

        Args:
            step: Its number; steps that are left out count as ones of which nothing is known.
            loss: Training loss of this rank, one number of any floating dtype on any device; None: there was none.
            gradient_norm: Norm of the gradient before clipping, likewise; None: not known.
        """
        if self._newest is not None and step > self._newest + 1:
            self._skip_to(step - 1)
        # copies: a compiled step may write its next loss into the same memory
        self._unread.append(
            [value.detach().clone() if isinstance(value, Tensor) else value for value in (loss, gradient_norm)]
        )
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
        known = np.concatenate([self._known, self._ahead])
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
            self._ahead = np.concatenate([self._ahead, _means(self._unread, ranks.sum_of_floats)])
            self._unread.clear()

    def state_dict(self, *, meet: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to see what this one will see: numbers, and lists of them.

        Args:
            meet: `fetch` first, as all ranks must. Else what was not fetched is taken for the mean over ranks.
        """
        if meet:
            self.fetch()
        unread = _means(self._unread, lambda sums: sums) if self._unread else self._ahead[:0]
        is_known: NDArray[np.bool_] = np.any(~np.isnan(self._known), axis=1)
        num_unknown = int(is_known.argmax()) if is_known.any() else len(is_known)
        return {
            "known": _without_nan(self._known[num_unknown:]),
            "ahead": _without_nan(np.concatenate([self._ahead, unread])),
            "newest": self._newest,
            "onset": None if self._onset is None else asdict(self._onset),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another run was; what this one observed so far is forgotten."""
        self.restart()
        known, self._ahead = (
            np.array(state_dict[name], dtype=np.float64).reshape(-1, 2) for name in ("known", "ahead")
        )
        self._known[self._num_kept - len(known) :] = known
        self._newest = state_dict["newest"]
        self._onset = None if state_dict["onset"] is None else Onset(**state_dict["onset"])

    def _skip_to(self, step: int) -> None:
        """Steps up to this one that nobody observed."""
        if self._newest is not None and step > self._newest:
            self._unread += [[None, None]] * min(step - self._newest, self._num_kept)
        self._newest = step

    def _spikes(self, known: _Floats) -> list[int]:
        """Which of the steps that are not judged yet belong to a spike, counted from the first of them."""
        out = sliding_window_view(self._loss_z(known) > self._threshold, self._within)
        spikes = (out.sum(axis=-1) >= self._sustained) & out[:, -1]
        if not np.isnan(known[:, _NORM]).all():  # mostly nobody knows them, and medians are what a read costs
            newest = sliding_window_view(self._robust_z(known[:, _NORM], lambda median: _LEAST_SCALE), self._within)
            spikes &= np.isnan(newest).all(axis=-1) | (newest > self._threshold).any(axis=-1)
        return [int(index) for index in np.flatnonzero(spikes | (known[self._num_kept :, _LOSS] == math.inf))]

    def _loss_z(self, known: _Floats) -> _Floats:
        return self._robust_z(known[:, _LOSS], lambda median: _LEAST_SCALE * np.abs(median))

    def _robust_z(self, values: _Floats, least: Callable[[_Floats], _Floats | float]) -> _Floats:
        """How far each step beyond the first `history + lag` lies from those before it; NaN: not judged.

        Args:
            values: One number of each step.
            least: From medians to the least scale that a distance is told in.
        """
        judged = values[self._history + self._lag :]
        before = sliding_window_view(values, self._history)[: len(judged)]  # (step, history)
        median = _median(before)
        with np.errstate(invalid="ignore"):  # infinity, which is a spike by itself, less infinity
            mad = _median(np.abs(before - median[:, None]))
            z = (judged - median) / np.maximum(np.maximum(_MAD_OF_NORMAL * mad, least(median)), 1e-30)
        return np.where(np.isfinite(before).sum(axis=-1) >= self._fewest, z, math.nan)

    def _with(self, step: int, known: _Floats) -> Onset:
        """The spike so far, with this step of it."""
        if self._onset is not None and step - self._onset.last <= self._calm:
            return replace(self._onset, last=step)
        loss = float(known[-1, _LOSS])
        if loss == math.inf:
            return Onset(step, step, "the training loss is NaN or infinite")
        out = np.flatnonzero(self._loss_z(known) > self._threshold)
        median = float(_median(known[: self._history, _LOSS]))
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


def _without_nan(rows: _Floats) -> list[list[float | None]]:
    """NaN as None: it is not JSON, and two states that are the same would not be equal."""
    return [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]


def _median(rows: _Floats) -> _Floats:
    """The lower median of what is known in each row; NaN where nothing is."""
    ordered = np.sort(rows, axis=-1)  # NaN comes last
    middle = np.maximum((~np.isnan(rows)).sum(axis=-1, keepdims=True) - 1, 0) // 2
    medians: _Floats = np.take_along_axis(ordered, middle, axis=-1)[..., 0]
    return medians


def _means(given: list[_Given], sum_over_ranks: Callable[[Tensor], Tensor]) -> _Floats:
    """`(step, 2)` in float64: loss and log of the norm; NaN: unknown, infinity: not finite. The same on all ranks."""
    tensors = [value for step in given for value in step if value is not None]
    # one copy to the host, which waits for the device
    host = iter(_on_host(tensors) if tensors else [])
    values = np.array([[math.nan if value is None else next(host) for value in step] for step in given])
    present = np.array([[value is not None for value in step] for step in given])
    finite = np.where(np.isfinite(values), values, np.where(present, math.inf, 0.0))
    sums, counts = sum_over_ranks(torch.from_numpy(np.stack([finite, present]))).numpy()
    with np.errstate(invalid="ignore", divide="ignore"):  # nobody had one: 0 / 0
        means = sums / counts
        means = np.where(np.isfinite(means) | (counts == 0), means, math.inf)
        return np.stack([means[:, _LOSS], np.log(means[:, _NORM])], axis=1)


def _on_host(values: list[_Number]) -> list[float]:
    tensors = [torch.as_tensor(value) for value in values]
    device = tensors[0].device
    numbers: list[float] = torch.stack([value.reshape(()).to(device, torch.float32) for value in tensors]).tolist()
    return numbers
