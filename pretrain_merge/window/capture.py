"""Taking a snapshot of the live model where one is due: of the model as it is, or the mean of the open interval.

This module knows the block that is open, and that ranks decide together. It knows no views and no merges.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import NoReturn

from torch import Tensor, nn

from pretrain_merge import parameters
from pretrain_merge.cadence import Progress, Upcoming
from pretrain_merge.config import WindowSettings
from pretrain_merge.errors import ProgressError
from pretrain_merge.parameters import Masters, Trained
from pretrain_merge.runtime import ranks, signals
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.block_mean import BlockMean
from pretrain_merge.window.breaks import Breaks
from pretrain_merge.window.stored import StoredWindow


class Capture:
    """Fills a window from the live model.

    Args:
        settings: When snapshots are due, and which tensors of the model they hold.
        stored: Where snapshots go.
        block: The open interval of `average: block`; None: a snapshot is the model after a step.
        breaks: Told of what ends a stretch.
        notices: What the user was told already.
        masters: Gives what an optimizer keeps of a parameter in float32; None: snapshots hold the parameters.

    Attributes:
        trained: Which tensors are merged: what trains, or once did.
        stored: Where snapshots go.
        counts: How much each tensor counts in a sum over ranks, by name; see `_counts_over_ranks`.
    """

    def __init__(
        self,
        settings: WindowSettings,
        stored: StoredWindow,
        block: BlockMean | None,
        breaks: Breaks,
        notices: WarnOnce,
        masters: Masters | None = None,
    ) -> None:
        self._cadence, values = settings.cadence, settings.config
        self._upcoming = Upcoming(settings.cadence)
        self.trained = Trained(
            merge_buffers=values.merge_buffers,
            batch_norm=values.batch_norm,
            masters=masters,
            **asdict(values.parameters),
        )
        self.stored = stored
        self._block = block
        self._breaks = breaks
        self._notices = notices
        self._segment_of_all = 0  # which all ranks have agreed upon
        self.counts: dict[str, float] = {}

    def observe(self, module: nn.Module, before: Progress, now: Progress, *, lr: tuple[float, ...]) -> bool:
        """Look at the model after a step; whether a snapshot was taken."""
        since, upcoming = self.stored.window.since, self._upcoming
        is_quiet = now.step in upcoming.quiet and since is upcoming.since
        due = not is_quiet and upcoming.crossed(before, now, since=since)
        if not due and self._block is None:
            return False
        # a handler that saves a checkpoint must not find a slot half written or a sum that was not counted yet
        touches = due or (self._block is not None and self._block.samples_at(now.step))
        with signals.deferred() if touches else nullcontext():
            if self._block is not None:
                return self._observe_block(self._block, module, before, now, lr=lr, due=due)
            return due and self._take(module, now, lr)

    def refuse_merged_weights(self, now: Progress) -> NoReturn:
        """Raise `ProgressError`: a model may hold a merge, and a snapshot could take the very slot that raw is in."""
        raise ProgressError(
            f"observe() was given {now} while merged weights are in the model. Allowed: steps of training, whose "
            f"weights are raw. Call it after the block of merged() or swap()."
        )

    def resume_from(self, progress: Progress) -> None:
        """Counters at which a resumed run starts; the interval that is open there began in the run before."""
        self._upcoming.forget()
        if self._block is not None and self._cadence.is_beyond(progress, since=self.stored.window.since):
            self._block.miss()

    def restore(self, module: nn.Module, live: Mapping[str, Tensor], segment: int) -> None:
        """The window holds snapshots of these tensors again, in this segment on all ranks. Collective where sharded."""
        self.counts = _counts_over_ranks(module, live)
        self._segment_of_all = segment

    def clear(self) -> None:
        """Forget all snapshots and the open interval, and give their memory back; breaks are remembered."""
        self.stored.clear()
        if self._block is not None:
            self._block.clear()

    def _observe_block(
        self, block: BlockMean, module: nn.Module, before: Progress, now: Progress, *, lr: tuple[float, ...], due: bool
    ) -> bool:
        # an iterate beyond the multiple that it crossed belongs to the next block: the block is ((k-1)V, kV]
        since = self.stored.window.since
        ends = self._cadence.index(now, since=since) > self._cadence.index(before, since=since)
        overshoots = ends and self._cadence.is_beyond(now, since=since)
        unseen = now.step > before.step + 1
        if unseen:
            block.miss()
        if not overshoots:
            block.sample(now.step, lambda: self._sources(module))
        taken = due and self._take(module, now, lr)
        if ends:
            block.restart()
        if overshoots:
            if unseen:  # some of what was not seen may belong to the new block
                block.miss()
            block.sample(now.step, lambda: self._sources(module))
        return taken

    def _take(self, module: nn.Module, now: Progress, lr: tuple[float, ...]) -> bool:
        with ranks.all_or_none(f"take the snapshot of step {now.step}"):
            live = self.trained.tensors(module)
            # P36: layers are frozen and unfrozen in a run; what is held then can be merged with nothing that comes
            if others := self.stored.why_others(live):
                self._breaks.at(now, f"the set of merged parameters changed: {others}")
                self.stored.clear()
            sources = self.trained.sources(module, live)
            if not self._all_ranks_take(sources, now):
                return False
            if self.counts.keys() != live.keys():
                self.counts = _counts_over_ranks(module, live)
            # only now: it is a pass over the accumulator, which a snapshot that is refused need not pay
            source = self._block.mean() if self._block is not None else [sources[name] for name in live]
            self.stored.capture(live, source, now, lr=lr, phase=self._breaks.phase)
        return True

    def _sources(self, module: nn.Module) -> Mapping[str, Tensor]:
        return self.trained.sources(module, self.trained.tensors(module))

    def _all_ranks_take(self, live: Mapping[str, Tensor], now: Progress) -> bool:
        """One decision for all ranks: a break on one is a break on all, and what one cannot take nobody takes."""
        window, block = self.stored.window, self._block
        is_complete = block is None or (block.is_complete and block.names == tuple(live))
        is_finite = is_complete and parameters.all_finite(list(live.values()) if block is None else block.sums)
        has_broken = window.segment != self._segment_of_all
        is_refused = is_complete and not is_finite
        num_broken, num_partial, num_non_finite = ranks.count(has_broken, not is_complete, is_refused)
        # rates are read on each rank, and one may see a change that others do not
        if num_broken and not has_broken:
            self._breaks.at(now, "another rank had one")
        self._segment_of_all = window.segment
        if num_partial:
            self._notices.warn(
                f"block {window.segment}",
                f"step {now.step}: no block mean, since its interval was not observed from its start.",
            )
        elif num_non_finite:
            # a break too, and all ranks have it: it is not news at the next snapshot
            self._breaks.at_refused(now)
            self._segment_of_all = window.segment
        return not num_partial and not num_non_finite


def _counts_over_ranks(module: nn.Module, live: Mapping[str, Tensor]) -> dict[str, float]:
    """How much each local tensor counts in a sum over ranks: 1 / n where n ranks hold the same elements.

    Every element of a parameter is held by as many ranks as every other, however meshes divide it, so n is what all
    ranks hold together over the size of the whole. Where nothing is sharded every rank has the whole model: 1.
    """
    # without a word to other ranks, whose turn of speaking this need not be
    if not parameters.is_sharded(module):
        return dict.fromkeys(live, 1.0)
    held = ranks.sum_over_ranks([tensor.numel() for tensor in live.values()])
    sizes = zip(live, parameters.whole_sizes(module, live), held, strict=True)
    return {name: whole / together if together else 1.0 for name, whole, together in sizes}
