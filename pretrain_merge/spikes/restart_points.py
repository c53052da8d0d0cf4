"""Restart points: copies of a run at intervals, of which the newest that are old enough to be trusted are kept.

This module knows steps and named tensors in host memory or in files. It knows no modules and no detector.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.kernels.weighted_sum import weighted_sum_
from pretrain_merge.spikes.live_state import WEIGHT

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class RestartPoint:
    """A run as it was after a step.

    Attributes:
        step: The step.
        read: Gives its tensors, by name.
        num_bytes: Of all of them.
        watch: What was known of the loss then.
        is_used: Whether a run went back to it already.
    """

    step: int
    read: Callable[[], Tensors]
    num_bytes: int
    watch: Mapping[str, Any]
    is_used: bool = False


class RestartPoints:
    """The restart points of a run on one rank, oldest first.

    All that are younger than `distrust` steps are kept, since they will be old enough one day, and the newest `keep` of
    those that are.

    Args:
        distrust: Steps before a divergence that are taken as damaged.
        keep: How many of the older ones are kept.
        folder: Where their tensors go; None: they stay in host memory.
    """

    def __init__(self, distrust: int, keep: int, folder: Path | None = None) -> None:
        self._distrust, self._keep, self._folder = distrust, keep, folder
        self._points: list[RestartPoint] = []

    def __len__(self) -> int:
        return len(self._points)

    @property
    def steps(self) -> tuple[int, ...]:
        """Of all points, oldest first."""
        return tuple(point.step for point in self._points)

    @property
    def points(self) -> tuple[RestartPoint, ...]:
        """All of them, oldest first."""
        return tuple(self._points)

    def add(self, step: int, copy: Callable[[], Tensors], watch: Mapping[str, Any], *, is_used: bool = False) -> None:
        """Keep the run as it is; those that are too old by now go first, to make room.

        Args:
            step: After which it is.
            copy: Gives its tensors.
            watch: What is known of the loss.
            is_used: Whether a run went back to it already.

        Raises:
            CheckpointError: The disk refuses.
        """
        old = [point for point in self._points if point.step <= step - self._distrust]
        kept = ([point for point in old if not point.is_used] or old)[-self._keep :]
        for point in old:
            if point not in kept:
                self._drop(point)
        tensors = copy()
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._points.append(RestartPoint(step, self._kept(step, tensors), num_bytes, watch, is_used))

    def trusted(self, onset: int) -> tuple[RestartPoint, ...]:
        """Points from `distrust` steps before an onset or earlier, oldest first, at most `keep`; else the oldest."""
        good = [point for point in self._points if point.step <= onset - self._distrust]
        good = good or [point for point in self._points[:1] if point.step < onset]
        # one that did not help before is left where there is an older one
        while len(good) > 1 and good[-1].is_used:
            good.pop()
        return tuple(good[-self._keep :])

    def newest_before(self, onset: int) -> RestartPoint | None:
        """What weights that did no harm are closest to an onset; None: there is no point from before."""
        return next((point for point in reversed(self._points) if point.step < onset), None)

    def forget(self, first: int, last: int | None = None) -> None:
        """Drop the points of these steps: they hold damage, and would be old enough to be trusted one day."""
        for point in [item for item in self._points if first <= item.step and (last is None or item.step <= last)]:
            self._drop(point)

    def mark_used(self, step: int) -> None:
        """A run went back to the point of this step: the next attempt goes further back where it can."""
        self._points = [replace(item, is_used=True) if item.step == step else item for item in self._points]

    def clear(self) -> None:
        """Give memory and files back."""
        for point in list(self._points):
            self._drop(point)

    def _kept(self, step: int, tensors: Tensors) -> Callable[[], Tensors]:
        if self._folder is None:
            return lambda: tensors  # never written in place: a checkpoint may be on its way to the disk in a thread
        path = self._path(step)
        try:
            atomic.make_folder(self._folder)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error}. Free space there, name another store_folder, or set store='host'."
            ) from error
        return lambda: load_file(path)

    def _drop(self, point: RestartPoint) -> None:
        self._points.remove(point)
        if self._folder is not None:
            self._path(point.step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"point-{step:08d}.safetensors"


def remove_leftovers(folder: Path) -> None:
    """Delete the points of a process that was killed: what a checkpoint needs of them is in it."""
    for path in folder.glob("point-*.safetensors"):
        path.unlink(missing_ok=True)


def most_points(distrust: int, every: int, keep: int) -> int:
    """How many restart points there are at most.

    >>> most_points(100, every=50, keep=1)
    3
    """
    return math.ceil(distrust / every) + keep


@torch.no_grad()
def mean_of(points: Sequence[RestartPoint]) -> Tensors:
    """Weights as the mean over points; all else as in the newest of them."""
    read = [point.read() for point in points]
    newest = dict(read[-1])  # a mean of counts or of second moments would belong to no weights
    names = [name for name in newest if name.startswith(WEIGHT) and all(name in tensors for tensors in read)]
    # what is restored must not be written into what is kept
    means = [newest[name].clone() for name in names]
    weighted_sum_(means, [[tensors[name] for name in names] for tensors in read], [1 / len(read)] * len(read))
    return newest | dict(zip(names, means, strict=True))
