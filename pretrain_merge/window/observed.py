"""A rolling window that fills from a live model: each step is looked at, and what is due, broken or damaged is seen.

`ObservedWindow` joins the parts below it: the cadence says when, the window which, the store where, and the breaks what
ends a stretch. It knows no views, no merges and no files.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from pretrain_merge.cadence import Progress
from pretrain_merge.config import WindowSettings
from pretrain_merge.parameters import Given, Masters, Modules
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.block_mean import BlockMean
from pretrain_merge.window.breaks import Breaks
from pretrain_merge.window.capture import Capture
from pretrain_merge.window.spike_breaks import Damage, SpikeBreaks
from pretrain_merge.window.stored import StoredWindow
from pretrain_merge.window.window import Window


class ObservedWindow:
    """Snapshots of one model, taken where they are due.

    Args:
        parsed: Which snapshots, and what ends a stretch of them.
        masters: Gives the float32 original of a parameter in 16 bits; None: snapshots hold the parameters.
        notices: What the user was told.
    """

    def __init__(self, parsed: WindowSettings, masters: Masters | None, notices: WarnOnce) -> None:
        values, limits = parsed.config, parsed.config.breaks
        # the open interval of `average: block`, whose mean is the next snapshot; None with `last`
        self._block = BlockMean(values.sample_every) if values.average == "block" else None
        self._stored = StoredWindow(values, of_masters=masters is not None)  # which snapshots are held, and their bytes
        self._breaks = Breaks(self._stored.window, self._block, values, notices)  # rate, phase, refusals
        self._spikes = SpikeBreaks(self.window, self._breaks, limits.distrust) if limits.spikes else None
        # fills the window from the live model, on all ranks or on none; knows which tensors are merged
        self._capture = Capture(parsed, self._stored, self._block, self._breaks, notices, masters)
        self._progress = Progress()  # counters of the last observed step
        self._lr: tuple[float, ...] = ()  # its rates
        self._snapshot_is_new = False  # whether it took a snapshot
        self._modules = Given()  # the model that was passed last

    @property
    def window(self) -> Window:
        """Which snapshots are held, and which of them are valid."""
        return self._stored.window

    @property
    def progress(self) -> Progress:
        """Counters of the last observed step."""
        return self._progress

    @property
    def lr(self) -> tuple[float, ...]:
        """Learning rates of the last observed step, per parameter group."""
        return self._lr

    @property
    def phase(self) -> str:
        """Name given to the last `mark_phase`, or empty."""
        return self._breaks.phase

    @property
    def num_refused(self) -> int:
        """Snapshots refused so far because they held NaN or infinity."""
        return self._breaks.num_refused

    @property
    def num_spikes(self) -> int:
        """Spikes of the training loss so far."""
        return self._breaks.num_spikes

    def watch(self, module: Modules, optimizers: Iterable[Any] = (), *, also: Sequence[str] = ()) -> None:
        """Look at the model before its first step: what trains now, or has state in an optimizer, is merged.

        A merger that is not told sees what requires a gradient at the steps where it takes a snapshot. Call it where
        layers are frozen and unfrozen by turns (GANs), so that the set is whole from the first snapshot on.

        Args:
            module: The live model.
            optimizers: Whose state tells what is stepped.
            also: Patterns (as in fnmatch) of parameters that are merged although they require no gradient and are in
                no optimizer: those of an average of the model that the loop itself moves.

        Raises:
            UnsupportedModelError: A pattern of `also` matches nothing.
        """
        self._capture.trained.watch(self._modules.as_one(module), optimizers, also=also)

    def tensors(self, module: Modules) -> dict[str, Tensor]:
        """The live tensors that merges are written into, by name; of sharded parameters the shards."""
        return self._capture.trained.tensors(self._modules.as_one(module))

    def resume_from(self, progress: Progress, *, begins: str = "") -> None:
        """Counters at which a resumed run starts, so that what lies behind it is not taken for a jump.

        Args:
            progress: The counters.
            begins: Why what was counted so far is not of this model, so that shares of the run count from here.
        """
        self._progress = progress
        if begins:
            self._breaks.at(progress, begins)
        self._capture.resume_from(progress)

    def observe(
        self,
        module: Modules,
        progress: Progress | int,
        *,
        lr: float | Sequence[float] = (),
        loss: Tensor | float | None = None,
        gradient_norm: Tensor | float | None = None,
    ) -> bool:
        """Look at the model after an optimizer step; takes a snapshot where one is due.

        Args:
            module: The live model, or several. It is read, never written.
            progress: Totals since the start of the run; an integer is a number of steps.
            lr: The learning rate that this step used, one per parameter group; a change is a break.
            loss: Training loss of this step, of which a spike is a break; on every rank or on none. A tensor is not
                waited for. None: not known.
            gradient_norm: Norm of its gradient before clipping, likewise: what `clip_grad_norm_` returns.

        Returns:
            Whether a snapshot was taken.

        Raises:
            ProgressError: A counter went backwards, or merged weights are in a model.
        """
        # questions whose answer is nearly always the same are asked here: what a step costs on which nothing is due is
        # its number of calls, and their code is no longer in a cache when a training step has run
        one = module if module is self._modules.one else self._modules.as_one(module)
        before = self._progress
        after = progress if isinstance(progress, Progress) else Progress(step=progress)
        if after.step <= before.step or after.samples < before.samples or after.tokens < before.tokens:
            before.followed_by(after)  # raises, and says why
        if self._stored.num_swaps:
            self._capture.refuse_merged_weights(after)
        self._progress = after
        if not isinstance(lr, tuple) or lr != self._lr:  # else as at the step before
            # what is not a sequence may be a number of torch (capturable optimizers) or NumPy
            self._lr = tuple(float(value) for value in lr) if isinstance(lr, Sequence) else (float(lr),)
        if self._lr != self._breaks.segment_lr:
            self._breaks.at_new_lr(after, self._lr)
        self._snapshot_is_new = False  # also where the capture fails
        self._snapshot_is_new = self._capture.observe(one, before, after, lr=self._lr)
        if loss is not None:
            self.judge(before, loss, gradient_norm)
        return self._snapshot_is_new

    def judge(
        self,
        before: Progress,
        loss: Tensor | float | None,
        gradient_norm: Tensor | float | None = None,
        *,
        is_copy: bool = False,
    ) -> Damage | None:
        """See whether the loss of the step that was observed last is part of a spike, as `observe` does with `loss`.

        Every rank calls it at every step, also one that has no loss there.

        Args:
            before: Counters of the step before.
            loss: As of `observe`.
            gradient_norm: As of `observe`.
            is_copy: Nobody writes into the memory of `loss` any more, so that it need not be copied.

        Returns:
            What is not to be trusted any more, where it is.
        """
        # after the capture: a snapshot that was taken in the middle of a spike is dropped with the others
        if self._spikes is None:
            return None
        damage = self._spikes.judge(before, self._progress, loss, gradient_norm, is_copy=is_copy)
        if damage is not None:
            self._snapshot_is_new = False
        return damage

    def judge_rest(self) -> Damage | None:
        """Judge the losses that wait for the next read, where no step follows. Collective."""
        return self._spikes.read(self._progress) if self._spikes is not None else None

    @property
    def trusted_until(self) -> int | None:
        """The last step whose weights no spike can make doubtful any more; None: nobody watches for spikes."""
        return self._spikes.trusted_until(self._progress) if self._spikes is not None else None

    def meet(self) -> None:
        """Bring the losses of all ranks together, before one of them makes the `manifest` alone. Collective."""
        if self._spikes is not None:
            self._spikes.meet()

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): snapshots before it are not merged."""
        self._breaks.at_phase(self._progress, name)
        if self._spikes is not None:
            self._spikes.mark_change()
