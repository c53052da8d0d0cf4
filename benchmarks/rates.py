"""What a machine does per second, in the terms of `pretrain_merge.plan.Hardware`: actions to time, and rates from them.

Knows tensors, files and how a rate follows from seconds. Knows nothing of merging.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Action, Timing
from pretrain_merge import parameters
from pretrain_merge.plan import Measured
from pretrain_merge.stores.budget import HOST_STAGING

# Of a tensor that stays in the cache: its elements, and how often one timing goes through them.
_CACHED, _REPEATS = 2**16, 64


def copy_all(sources: Sequence[Tensor]) -> Action:
    """A plain copy of every tensor: the yardstick, and the bandwidth of memory."""
    targets = [torch.empty_like(tensor, requires_grad=False) for tensor in sources]

    @torch.no_grad()
    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


def in_cache(dtype: torch.dtype, slot_dtype: torch.dtype) -> dict[str, Action]:
    """A copy, a finite check and, where the dtypes differ, a rounding copy of tensors that stay in a core's cache."""
    source = torch.randn(_CACHED).to(dtype)
    target, slot = torch.empty_like(source), torch.empty_like(source, dtype=slot_dtype)
    actions: dict[str, Action] = {
        "cached copy": lambda: target.copy_(source),
        "cached check": lambda: parameters.all_finite([source]),
    }
    if slot_dtype != dtype:
        actions["cached rounding"] = lambda: slot.copy_(source)
    return {name: _repeated(action) for name, action in actions.items()}


def into_file(num_bytes: int, path: Path) -> dict[str, Action]:
    """One thread copies so many bytes into two buffers, from which another writes a new file; and away with it."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    buffers = itertools.cycle([torch.ones(HOST_STAGING // 2, dtype=torch.uint8) for _ in range(2)])

    def write() -> None:
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
            writing: Future[int] | None = None
            for piece, buffer in zip(source.split(HOST_STAGING // 2), buffers, strict=False):
                buffer[: len(piece)].copy_(piece)
                if writing is not None:
                    writing.result()
                writing = writer.submit(file.write, buffer.numpy().data[: len(piece)])

    return {"write": write, "clear": lambda: path.unlink(missing_ok=True)}


def rates_of_rounds(timed: Mapping[str, Timing], num_bytes: int, itemsize: int, slot_itemsize: int) -> list[Measured]:
    """The rates of every round.

    Args:
        timed: The actions above, as far as they were timed, with `copy_all` as yardstick.
        num_bytes: What that copied, and `into_file` wrote.
        itemsize: Bytes per element of the cached tensors.
        slot_itemsize: The same of what they are rounded to.
    """
    # a third of the writes is held up by the system; the plan is of the others, so rounds share the lower quartile
    file_rate = num_bytes / statistics.quantiles(timed["write"].seconds, n=4)[0] if "write" in timed else None

    def arithmetic(name: str, moved: int, number: int) -> float | None:
        """Elements per second of what is left when a copy would have moved the same bytes in the same cache."""
        if name not in timed:
            return None
        moving = timed["cached copy"].seconds[number] * moved / (2 * itemsize)
        seconds = timed[name].seconds[number] - moving
        return _CACHED * _REPEATS / seconds if seconds > 0 else None

    return [
        Measured(
            memory_rate=2 * num_bytes / seconds,
            file_rate=file_rate,
            check_rate=arithmetic("cached check", itemsize, number),
            rounding_rate=arithmetic("cached rounding", itemsize + slot_itemsize, number),
        )
        for number, seconds in enumerate(next(iter(timed.values())).yardstick)
    ]


def _repeated(action: Action) -> Action:
    def repeat() -> None:
        for _ in range(_REPEATS):
            action()

    return repeat
