"""Agreement between ranks: one small reduction, and nothing where there is one process.

This module knows process groups and nothing of merging. Every rank must call these functions at the same point.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from pretrain_merge.errors import RankError

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_ErrorT = TypeVar("_ErrorT", bound=BaseException)
# flags of one reduction: a rank that failed does not know which exchange it joins, so all have one size
_NUM_FLAGS = 3
_KNOWN = "_known_to_all_ranks"
_doing: list[str] = []  # what the open blocks do, outermost first: a rank that hears of a failure says what it was at


def num_ranks() -> int:
    """Processes in the default group; 1 where none is set up."""
    if not _has_group():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def rank() -> int:
    """Number of this process in the default group; 0 where none is set up."""
    if not _has_group():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def _has_group() -> bool:
    # whoever set one up has loaded torch.distributed, which costs a merge of files more than the merge does
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return count(flag)[0] > 0


def count(*flags: int) -> list[int]:
    """How many ranks set each of up to three flags, or the sums of as many counts: all ranks meet here.

    Raises:
        RankError: Another rank failed in the block.
    """
    counts = _summed([0, *map(int, flags), *[0] * (_NUM_FLAGS - len(flags))])
    if counts[0]:
        raise _mark_known(RankError(f"cannot {_doing[-1] if _doing else 'ask all ranks'}: {_reasons(None)}"))
    return counts[1:]


@contextmanager
def all_or_none(what: str, *, patience: timedelta | None = None) -> Iterator[None]:
    """Do a thing on every rank, or raise on every rank: the one that failed its own error, the others `RankError`.

    One small reduction at the end of the block, and one for each `count`, `gather` or sum inside; a rank that failed
    joins the next of them, wherever in the block (or in one inside it) the others are.

    Args:
        what: What is done, to infinitive, for the message.
        patience: How long a rank that failed waits for the others to hear of it; then it leaves with its reason, and
            its end breaks off whatever they wait for. None: as long as the process group has it.

    Raises:
        RankError: Another rank failed; its reason is in the message.
    """
    # by the caller, as in a save because of an exception: what fails now is another failure
    handled = sys.exc_info()[1]
    _doing.append(what)
    try:
        yield
        count()
    except BaseException as error:
        if num_ranks() > 1 and not _is_known(error, handled):
            with suppress(Exception):  # a group that is broken too must not hide the reason
                _summed([1, *[0] * _NUM_FLAGS], patience=patience)
                _reasons(f"{type(error).__name__}: {error}")
            _mark_known(error)
        raise
    finally:
        _doing.pop()


def _reasons(own: str | None) -> str:
    failed = {number: reason for number, reason in enumerate(_gathered(own)) if reason is not None}
    return "; ".join(f"rank {number} failed with {reason}" for number, reason in failed.items())


def _mark_known(error: _ErrorT) -> _ErrorT:
    setattr(error, _KNOWN, True)
    return error


def _is_known(error: BaseException | None, handled: BaseException | None) -> bool:
    """Whether all ranks know of it, or of what it came from: each failure is told once."""
    if error is None or error is handled:
        return False
    # an error that was raised from a known one, or while that was handled, is the same failure
    return hasattr(error, _KNOWN) or _is_known(error.__cause__, handled) or _is_known(error.__context__, handled)


def is_known_to_all_ranks(error: BaseException) -> bool:
    """Whether every rank has met this error or its `RankError`: in one process, or where `all_or_none` told of it."""
    return num_ranks() == 1 or _is_known(error, None)


def gather(value: _T) -> list[_T]:
    """What each rank gave, in the order of ranks.

    Raises:
        RankError: Another rank failed before it came here, in an `all_or_none` that this one is in too.
    """
    count()
    return _gathered(value)


def sum_over_ranks(numbers: Sequence[int]) -> list[int]:
    """Sums over all ranks, in int64.

    Raises:
        RankError: As `gather`.
    """
    if len(numbers) <= _NUM_FLAGS:
        return count(*numbers)[: len(numbers)]
    count()
    return _summed(numbers)


def sum_of_floats(numbers: "torch.Tensor") -> "torch.Tensor":
    """Sum over all ranks of a float64 tensor on the host that has one shape on all of them, the same bits on each.

    Raises:
        RankError: As `gather`.
    """
    count()  # first, since a rank that failed joins an exchange of flags
    if num_ranks() == 1:
        return numbers
    import torch.distributed as dist

    total = numbers.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(total)  # torch promises bits that are equal on all ranks
    return total.cpu()


def _gathered(value: _T) -> list[_T]:
    values: list[_T] = [value] * num_ranks()
    if len(values) > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def _summed(numbers: Sequence[int], *, patience: timedelta | None = None) -> list[int]:
    if num_ranks() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    # NCCL reduces what is on a device only
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    # int64: tokens of a run pass 2^31, and float32 stops counting at 2^24
    total = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(total, async_op=True).wait(*[patience] if patience else [])
    sums: list[int] = total.tolist()
    return sums
