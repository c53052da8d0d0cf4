"""When a loss spike began, from the training loss and, where it is known, the norm of the gradient.

This module knows numbers of steps and nothing of windows, models or trainers. A step is judged by the steps before it:
its distance from their median, in units of their median absolute deviation.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain_merge.runtime import ranks
from pretrain_merge.spikes.running_z import RunningZ

_LEAST_SCALE = 1e-3  # of the median loss, and in log norm: a set-up without noise must not take rounding for a spike
# Steps between two reads of a run: each waits for the device and for all ranks, and a collapse shall be known within 15
# steps of its begin.
READ_EVERY = 10
_AT_ONCE = 50  # steps, no more than `calm`; what is seen does not depend on it
_LOSS, _NORM = 0, 1
_Number = Tensor | float
_Given = list[_Number | None]  # loss and norm of a step on this rank
_Row = tuple[float, float]  # loss and log of the norm of a step over all ranks; NaN: not known
_UNKNOWN: _Row = (math.nan, math.nan)


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

    @property
    def told(self) -> str:
        """In a few words."""
        return f"spike from step {self.step} on: {self.reason}"


class SpikeDetector:
    """Tells where the loss left what the steps before led to expect, with all ranks of one mind.

    A step is out of bounds where its robust z, `(x - median) / (1.4826 MAD)` over `history` steps before it, is beyond
    `threshold`, and it is higher than three quarters of these. A spike is seen where the loss was so in `sustained` of
    `within` steps and, where gradient norms are known, the log of the norm was so in one of them. A loss of NaN or
    infinity is a spike at once.

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
        # the first of the newest `within` steps needs `lag` and `history` before it
        self._num_kept = history + lag + within - 1
        self.restart()

    def restart(self) -> None:
        """Forget all steps: no earlier loss says what to expect. Every rank calls it at the same step."""
        self._unread: list[_Given] = []
        self._newest: int | None = None  # step of the last row of all these
        self._forget()

    def mark_change(self) -> None:
        """As `restart`, on all ranks where at least one calls it, but from the next read on."""
        # what was not read stays until then, since ranks exchange as much of it as the others
        self._is_changed = True

    def _forget(self) -> None:
        self._is_changed = False  # whether what was seen so far is to be forgotten at the next read
        self._known: deque[_Row] = deque([_UNKNOWN] * self._num_kept, self._num_kept)  # judged already
        self._ahead: list[_Row] = []  # on the host, not judged yet
        self._onset: Onset | None = None
        limits: dict[str, Any] = {"fewest": self._fewest, "threshold": self._threshold, "least_scale": _LEAST_SCALE}
        self._losses, self._norms = RunningZ(relative=True, **limits), RunningZ(relative=False, **limits)
        # of the newest `within` steps: whether its loss and its norm were out of bounds, and the median before it
        self._judged: deque[tuple[bool, bool | None, float]] = deque(maxlen=self._within)

    def observe(
        self, step: int, loss: _Number | None, gradient_norm: _Number | None = None, *, is_copy: bool = False
    ) -> None:
        """Note what a step gave, without waiting for the device.

        Args:
            step: Its number; steps that are left out count as ones of which nothing is known.
            loss: Training loss of this rank, one number of any floating dtype on any device; None: there was none.
            gradient_norm: Norm of the gradient before clipping, likewise; None: not known.
            is_copy: Nobody writes into the memory of `loss` any more: it is kept as it is.
        """
        if self._newest is not None and step > self._newest + 1:
            self._skip_to(step - 1)
        self._unread.append([loss if is_copy else _kept(loss), None if gradient_norm is None else _kept(gradient_norm)])
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
        before, first = self._onset, step - len(self._ahead) + 1
        for at, row in enumerate(self._ahead, start=first):
            if self._is_spike(row):
                self._onset = self._with(at, row[_LOSS])
        self._ahead = []
        if self._onset is None or self._onset is before:
            return None
        return replace(self._onset, is_new=before is None or before.step != self._onset.step)

    def fetch(self) -> None:
        """Bring what was observed to the host, as the mean over ranks; judges nothing. All ranks meet here.

        Raises:
            RankError: Another rank failed before it came here.
        """
        if self._unread:
            rows, is_changed = _means(self._unread, self._is_changed, ranks.sum_of_floats)
            self._unread.clear()
            if is_changed:
                self._forget()
            else:
                self._ahead += rows

    def state_dict(self, *, meet: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to see what this one will see: numbers, and lists of them.

        Args:
            meet: `fetch` first, as all ranks must. Else what was not fetched is taken for the mean over ranks.
        """
        if meet:
            self.fetch()
        if self._is_changed:  # what a run that goes on from here is to forget as well
            return {"known": [], "ahead": [], "newest": self._newest, "onset": None}
        unread, _ = _means(self._unread, self._is_changed, lambda sums: sums) if self._unread else ([], False)
        known = list(self._known)
        num_unknown = next((index for index, row in enumerate(known) if not all(map(math.isnan, row))), len(known))
        return {
            "known": _without_nan(known[num_unknown:]),
            "ahead": _without_nan([*self._ahead, *unread]),
            "newest": self._newest,
            "onset": None if self._onset is None else asdict(self._onset),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another run was; what this one observed so far is forgotten."""
        self.restart()
        for row in _with_nan(state_dict["known"]):
            self._is_spike(row)  # again, for what it leaves behind; it was told then
        self._ahead = _with_nan(state_dict["ahead"])
        self._newest = state_dict["newest"]
        self._onset = None if state_dict["onset"] is None else Onset(**state_dict["onset"])

    def _skip_to(self, step: int) -> None:
        """Steps up to this one that nobody observed."""
        if self._newest is not None and step > self._newest:
            self._unread += [[None, None]] * min(step - self._newest, self._num_kept)
        self._newest = step

    def _is_spike(self, row: _Row) -> bool:
        """Judge the step after those that are known, which then is one of them."""
        known = self._known
        loss, norm = row
        self._judged.append((self._losses.is_out(loss) is True, self._norms.is_out(norm), self._losses.median))
        # the window of the next step: one step beyond what is left out comes in
        entering, leaving = known[len(known) - self._lag] if self._lag else row, known[self._within - 1]
        self._losses.move(entering[_LOSS], leaving[_LOSS])
        self._norms.move(entering[_NORM], leaving[_NORM])
        known.append(row)
        if loss == math.inf:
            return True
        if not self._judged[-1][0] or sum(out for out, _, _ in self._judged) < self._sustained:
            return False
        norms = [out for _, out, _ in self._judged]
        return any(norms) or all(out is None for out in norms)

    def _with(self, step: int, loss: float) -> Onset:
        """The spike so far, with the step that was judged last."""
        if self._onset is not None and step - self._onset.last <= self._calm:
            return replace(self._onset, last=step)
        if loss == math.inf:
            return Onset(step, step, "the training loss is NaN or infinite")
        first = next(index for index, (out, _, _) in enumerate(self._judged) if out)
        median = self._judged[0][2]
        return Onset(
            step - (len(self._judged) - 1) + first,
            step,
            f"the training loss rose to {loss:.3g} from a median of {median:.3g}",
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


def _kept(value: _Number | None) -> _Number | None:
    """A copy: a compiled step may write its next loss into the same memory."""
    if not isinstance(value, Tensor):
        return value
    # on the host there is nothing to wait for, and to read a number takes a third of what a copy of a tensor does
    return float(value.item()) if value.is_cpu else value.detach().clone()


def _without_nan(rows: Iterable[_Row]) -> list[list[float | None]]:
    """NaN as None: it is not JSON, and two states that are the same would not be equal."""
    return [[None if math.isnan(value) else value for value in row] for row in rows]


def _with_nan(rows: Iterable[Sequence[float | None]]) -> list[_Row]:
    return [(math.nan if loss is None else loss, math.nan if norm is None else norm) for loss, norm in rows]


def _means(
    given: list[_Given], is_changed: bool, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[list[_Row], bool]:
    """In float64; NaN: unknown, infinity: not finite; and whether any rank was told of a change. The same on all."""
    tensors = [value for step in given for value in step if isinstance(value, Tensor)]
    # one copy to the host, which waits for the device
    host = iter(_on_host(tensors) if tensors else [])
    values = [
        next(host) if isinstance(value, Tensor) else math.nan if value is None else float(value)
        for step in given
        for value in step
    ]
    present = [float(value is not None) for step in given for value in step]
    finite = [
        value if math.isfinite(value) else math.inf if there else 0.0
        for value, there in zip(values, present, strict=True)
    ]
    # rows of tensors of a few numbers cost more than the numbers: lists, but for what ranks add up
    here = torch.tensor([[*finite, 0.0], [*present, is_changed]], dtype=torch.float64)
    (*sums, _), (*counts, num_changed) = sum_over_ranks(here).tolist()
    means = [_mean(*item) for item in zip(sums, counts, strict=True)]
    return list(zip(means[_LOSS::2], map(_log, means[_NORM::2]), strict=True)), num_changed > 0


def _mean(total: float, count: float) -> float:
    if not count:  # nobody had one
        return math.nan
    mean = total / count
    return mean if math.isfinite(mean) else math.inf


def _log(norm: float) -> float:
    return math.log(norm) if norm > 0.0 else -math.inf if norm == 0.0 else math.nan


def _on_host(tensors: list[Tensor]) -> list[float]:
    device = tensors[0].device
    # a call of torch takes longer than these three questions, whose answer is mostly yes
    plain = [
        value
        if value.dtype == torch.float32 and not value.ndim and value.device == device
        else value.reshape(()).to(device, torch.float32)
        for value in tensors
    ]
    numbers: list[float] = torch.stack(plain).tolist()
    return numbers
