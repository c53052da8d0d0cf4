"""Ranks in lockstep through an evaluation loop: on the same loader, each batch begun together, and nobody left waiting.

This module knows Lightning's evaluation loop and how ranks agree. It knows no weights and no metrics' values.
"""

import time
from typing import Any

from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import loaders
from pretrain_merge.runtime import ranks, signals

_SKEW = 2.0  # seconds between the first and the last rank that gets a signal
_PAUSE = 0.01  # seconds between two looks for it


class Lockstep:
    """One evaluation on all ranks, inside `ranks.all_or_none`.

    Args:
        is_sharded: Whether every forward needs all ranks.
    """

    def __init__(self, *, is_sharded: bool) -> None:
        self._is_sharded = is_sharded
        self._loader = 0

    def start(self) -> None:
        """Wait until every rank has started the evaluation.

        Raises:
            EvaluationInterrupted: A signal waits on some rank.
        """
        self._meet(has_more=True)

    def run(self, loop: Any) -> None:
        """Run a loop, whatever batches of its loaders this rank has: none of some of them, or none at all.

        Raises:
            EvaluationError: Ranks have unequal batches where the model or a metric needs all of them.
            EvaluationInterrupted: A signal waits on some rank.
        """
        step, store, end = loop._evaluation_step, loop._store_dataloader_outputs, loop.on_run_end

        def step_with_all(batch: Any, batch_idx: int, dataloader_idx: int, *rest: Any) -> None:
            self._end_loaders(loop, until=dataloader_idx)
            self._meet(has_more=True)
            step(batch, batch_idx, dataloader_idx, *rest)

        def store_with_all() -> None:
            self._end_loaders(loop, until=self._loader + 1)
            store()  # here objects of torchmetrics sync themselves

        def end_with_all() -> Any:
            self._end_loaders(loop, until=_num_loaders(loop))
            return end()

        # P4: the loop stays Lightning's; ranks meet at the places where one of them could be left waiting
        loop._evaluation_step, loop._store_dataloader_outputs, loop.on_run_end = (
            step_with_all, store_with_all, end_with_all
        )  # fmt: skip
        self._loader = 0
        loop.run()
        self._end_loaders(loop, until=_num_loaders(loop))  # Lightning runs no loop without a batch

    def _end_loaders(self, loop: Any, *, until: int) -> None:
        """Wait for the ranks that have more batches of the loaders before this one."""
        while self._loader < until:
            syncs = _syncs_itself(loop, self._loader)
            while self._meet(has_more=False, syncs=syncs):
                pass
            self._loader += 1

    def _meet(self, *, has_more: bool, syncs: bool = False) -> bool:
        """Whether any rank has a batch left; each says of itself, and all leave together where a signal waits."""
        num_more, num_interrupted, num_syncing = ranks.count(has_more, signals.pending(), syncs)
        num_ranks = ranks.num_ranks()
        if num_more and num_interrupted:
            self._let_the_signal_reach_all(num_interrupted)
            raise loaders.EvaluationInterrupted
        if self._is_sharded and 0 < num_more < num_ranks:
            raise EvaluationError(
                f"validation loader {self._loader}: {num_ranks - num_more} ranks have no validation batch left and "
                f"{num_more} have one. A sharded model gathers its parameters in every forward, so all ranks need the "
                f"same number. Use a DistributedSampler, or limit_val_batches."
            )
        if not num_more and 0 < num_syncing < num_ranks:
            raise EvaluationError(
                f"validation loader {self._loader}: {num_syncing} of {num_ranks} ranks logged an object of "
                f"torchmetrics, which syncs over all ranks, so none would end. Give every rank a batch, or log a "
                f"tensor, or update the object in validation_step and log it in on_validation_epoch_end."
            )
        return num_more > 0

    def _let_the_signal_reach_all(self, num_signalled: int) -> None:
        """A launcher signals one rank after another, and Lightning's handler waits for that of the other ranks."""
        deadline, num_waiting = time.monotonic() + _SKEW, 1
        while num_signalled < ranks.num_ranks() and num_waiting:
            time.sleep(_PAUSE)
            num_signalled, num_waiting, _ = ranks.count(signals.pending(), time.monotonic() < deadline)


def _num_loaders(loop: Any) -> int:
    return len(loop._combined_loader.flattened) if loop._is_sequential else 1


def _syncs_itself(loop: Any, loader: int) -> bool:
    """Whether this rank has an object of torchmetrics that will sync at the end of a loader."""
    index = loader if _num_loaders(loop) > 1 else None
    return any(
        item.meta.dataloader_idx == index and not item.has_reset and item.meta.on_epoch
        and not item.is_tensor and getattr(item.value, "sync_on_compute", True)
        for item in loop._results.values()
    )  # fmt: skip
