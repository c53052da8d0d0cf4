"""Merged weights in the live model, and raw back bit for bit, however the block ends.

This module knows places, memory and snapshots. It knows no names of views: it writes what it is told to.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from pretrain_merge import coefficients
from pretrain_merge.errors import WindowNotReadyError
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.merging.views import Merge
from pretrain_merge.parameters import Places, Trained, copy_
from pretrain_merge.records import Recipe
from pretrain_merge.runtime import signals
from pretrain_merge.runtime.random_state import random_state_kept
from pretrain_merge.window.capture import Capture
from pretrain_merge.window.stored import StoredWindow
from pretrain_merge.window.window import Snapshot


class Swap:
    """The live model while it may hold merges.

    Args:
        module: The live model, with raw weights.
        trained: Lists its tensors.
        stored: The snapshots.

    Raises:
        WindowNotReadyError: The model has other parameters than the snapshots.
    """

    def __init__(self, module: nn.Module, trained: Trained, stored: StoredWindow) -> None:
        self._stored = stored
        listed = trained.tensors(module)
        # what trains only since the last snapshot is in none, and stays raw
        self._live = {name: listed[name] for name in stored.names if name in listed}
        pruned = {name: listed[now] for name in stored.names if (now := _made_permanent(name, listed))}
        self._live |= pruned
        self._zeros = [(tensor, tensor == 0) for tensor in pruned.values()]
        self._places = Places(module, listed)
        if others := stored.why_others(self._live):
            raise WindowNotReadyError(
                f"the model is not the one that was observed: {others}. Allowed: parameters of the names, shapes, "
                f"dtypes and devices that the snapshots have. Merge before the model is changed, or go on observing "
                f"it: the window refills."
            )
        self._raw_slot = stored.raw_slot(self._live)
        in_slot = self._live if self._raw_slot is not None else {}
        # P31: all of them where no slot holds raw bit for bit
        self._copied = [tensor for name, tensor in listed.items() if name not in in_slot]
        self._copies = [tensor.clone() for tensor in self._copied]

    @contextmanager
    def entered(self) -> Iterator["Swap"]:
        """Signals wait inside; raw is back at the end, in the objects and the memory that it was in.

        Raises:
            UnsupportedModelError: A parameter was replaced by something that cannot be undone; all others are raw.
        """
        with signals.deferred(), self._places.versions_kept():
            # counted, since merges nest; while one is open no step may be observed
            self._stored.num_swaps += 1
            try:
                yield self
            finally:
                self._stored.num_swaps -= 1
                try:
                    self._places.put_back()
                finally:
                    # also where a parameter could not be put back: all others are raw
                    self._restore()

    def write(self, merge: Merge, *, spread: bool | Mapping[str, float] = False) -> Spread | None:
        """Write a merge into the model; the spread of its snapshots if it is asked for."""
        self._places.put_back()
        measured = self._stored.merge_(self._live, merge.snapshots, merge.recipe.coefficients, spread=spread)
        # snapshots from before the pruning are not 0 there
        for tensor, zeros in self._zeros:
            tensor.masked_fill_(zeros, 0)
        return measured

    def _restore(self) -> None:
        if self._copies:
            copy_(self._copied, self._copies)
        if self._raw_slot is not None:
            self._stored.restore_raw(self._live, self._raw_slot)


def _made_permanent(name: str, live: Mapping[str, object]) -> str | None:
    """The name that a pruned parameter has once its mask was multiplied into it (`torch.nn.utils.prune.remove`).

    `ModelPruning` does so when training ends. The mask is gone then, but its zeros are in the live weights.
    """
    now = name.removesuffix("_orig")
    return now if name not in live and now != name and now in live else None


@contextmanager
def swapped(
    module: nn.Module,
    capture: Capture,
    spread: "WindowSpread",
    resolve: Callable[[str], Merge],
) -> Iterator[Callable[[str], Recipe]]:
    """Merges of views in the live model one after another, with one restore at the end.

    Whatever draws random numbers before the first view (an evaluation of raw), or while one is in the model, draws the
    same ones, and the run goes on with those that it would have drawn without (P6).

    Args:
        module: The live model, with raw weights.
        capture: Filled the window.
        spread: Measured on the way, in one more pass where no view read the whole window.
        resolve: The merge that a view is now.

    Yields:
        A function that writes one view's merge into the live model.
    """
    written: list[str] = []
    stored = capture.stored

    def merge_view(view: str) -> Recipe:
        merge = resolve(view)
        written.append(view)
        spread.write(swap, merge, stored.window.valid, capture.counts)
        set_back()
        return merge.recipe

    with Swap(module, capture.trained, stored).entered() as swap, random_state_kept() as set_back:
        yield merge_view
        if written:
            spread.complete(swap, stored.window.valid, capture.counts)


class WindowSpread:
    """How far the snapshots of a whole window lie from their mean, measured once for each state of the window.

    Attributes:
        sums: Of what this rank holds, as they were measured last; None before.
    """

    def __init__(self) -> None:
        self.sums: Spread | None = None
        self._snapshots: tuple[Snapshot, ...] = ()  # that `sums` is of

    def write(self, swap: Swap, merge: Merge, valid: tuple[Snapshot, ...], counts: Mapping[str, float]) -> None:
        """Write a merge, and measure on the way where it reads the whole window and that was not measured yet."""
        is_new = merge.snapshots == valid != self._snapshots
        measured = swap.write(merge, spread=counts if is_new else False)
        if measured is not None:
            self.sums, self._snapshots = measured, valid

    def complete(self, swap: Swap, valid: tuple[Snapshot, ...], counts: Mapping[str, float]) -> None:
        """One pass over the window, where no merge read the whole of it. It leaves a merge in the model."""
        if valid != self._snapshots:
            self.write(swap, Merge(valid, Recipe((), coefficients.sma(len(valid)))), valid, counts)
