"""The state machine that any training loop can drive: observe every step, merge when it is due, raw weights back.

`RollingMerger` joins the parts below it: the cadence says when, the window which, the coefficients how much, the store
where, and `weighted_sum_` does the arithmetic. It knows no trainer, no evaluation and no logger.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn

from pretrain_merge import config
from pretrain_merge.cadence import Progress
from pretrain_merge.errors import CheckpointError, ConfigError, WindowNotReadyError
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.merging.swap import WindowSpread, swapped
from pretrain_merge.merging.views import Merge, Views
from pretrain_merge.parameters import Given, Masters, Modules, is_sharded
from pretrain_merge.records import RAW, Recipe
from pretrain_merge.resume.manifest import Manifest
from pretrain_merge.resume.saved_window import SavedWindow
from pretrain_merge.resume.states import States
from pretrain_merge.runtime import signals
from pretrain_merge.runtime.log import WarnOnce
from pretrain_merge.window.block_mean import BlockMean
from pretrain_merge.window.breaks import Breaks
from pretrain_merge.window.capture import Capture
from pretrain_merge.window.spike_breaks import Damage, SpikeBreaks
from pretrain_merge.window.stored import StoredWindow
from pretrain_merge.window.window import Window

_T = TypeVar("_T")


class RollingMerger:
    """A rolling window of snapshots of one model, and their merges.

    Wherever a model is asked for, several will do, as they were passed to `observe`: a sequence (pipeline stages, whose
    names stay as they are unless two stages share one) or a mapping, whose keys come in front of names.

    Args:
        settings: Parsed settings; None: they are parsed from the options.
        masters: Gives the float32 original that an optimizer keeps of a parameter in 16 bits, and None for one that
            has none. Snapshots then hold originals, and a merge is rounded once. None: they hold the parameters.
        window_folder: Where `state_dict` keeps the snapshots that a checkpoint needs; of this run alone.
        keep_windows: Of how many of the newest states the snapshots stay in that folder; None: of all, so that a run
            can go on from any of its checkpoints, at the cost of up to `window` snapshots for each.
        on_missing: When `load_state_dict` finds no such window: "error", or "refill", which starts an empty one.
        **options: The keys of `pretrain_merge.config.WindowConfig`: `window`, `every`, `start`, `merge_every`,
            `views`, `span`, `average`, `sample_every`, `lr_tolerance`, `breaks`, `parameters`, `merge_buffers`,
            `batch_norm`, `store`, `store_folder`, `slot_dtype`.

    Raises:
        ConfigError: An unknown key or an impossible value.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> merger = RollingMerger(window=4, every=4)
    >>> for step in range(1, 17):
    ...     with torch.no_grad():
    ...         _ = model.weight.fill_(step)  # stands for an optimizer step
    ...     _ = merger.observe(model, step)
    >>> with merger.merged(model, "sma"):  # mean of steps 4, 8, 12, 16
    ...     model.weight.tolist()
    [[10.0, 10.0]]
    >>> model.weight.tolist()
    [[16.0, 16.0]]
    """

    def __init__(
        self,
        settings: config.WindowSettings | None = None,
        *,
        masters: Masters | None = None,
        window_folder: str | PathLike[str] | None = None,
        keep_windows: int | None = None,
        on_missing: str = "error",
        **options: Any,
    ) -> None:
        parsed = settings or config.parse_window_settings(options)
        if on_missing not in ("error", "refill"):
            raise ConfigError(f"on_missing: {on_missing!r} is not error or refill.")
        values, notices = parsed.config, WarnOnce()
        self._merge_cadence = parsed.merge_cadence  # when merges are due
        self._views = Views(parsed.views, parsed.cadence, values.average)  # which snapshots, how much of each
        # the open interval of `average: block`, whose mean is the next snapshot; None with `last`
        self._block = BlockMean(values.sample_every) if values.average == "block" else None
        self._stored = StoredWindow(values, of_masters=masters is not None)  # which snapshots are held, and their bytes
        self._breaks = Breaks(self._stored.window, self._block, values, notices)  # rate, phase, refusals
        limits = values.breaks
        self._spikes = SpikeBreaks(self.window, self._breaks, limits.distrust) if limits.spikes else None
        # fills the window from the live model, on all ranks or on none; knows which tensors are merged
        self._capture = Capture(parsed, self._stored, self._block, self._breaks, notices, masters)
        self._saved = SavedWindow(
            parsed, self._block, self._breaks, self._spikes, self._capture
        )  # which files hold the snapshots
        self._progress = Progress()  # counters of the last observed step
        self._lr: tuple[float, ...] = ()  # its rates
        self._snapshot_is_new = False  # whether it took a snapshot
        self._spread = WindowSpread()  # of the whole window, as it was measured last
        self._states = States(Path(window_folder) if window_folder is not None else None, keep_windows)
        self._on_missing, self._notices = on_missing, notices
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

    @property
    def spread(self) -> float:
        """Relative RMS distance of the valid snapshots from their mean, once a `swap` has ended; NaN before.

        Of what this rank holds: of the whole model, but for shards. Add `spread_sums` over ranks for that.
        """
        return self.spread_sums.relative_rms if self.spread_sums is not None else float("nan")

    @property
    def spread_sums(self) -> Spread | None:
        """What `spread` is made of. Where parameters are sharded, sums over ranks are those of the whole model.

        A merge communicates nothing, so these are of this rank alone; what n ranks hold alike counts 1 / n on each.
        """
        return self._spread.sums

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the configured views."""
        return self._views.names

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

    def resume_from(self, progress: Progress) -> None:
        """Counters at which a resumed run starts, so that what lies behind it is not taken for a jump."""
        self._progress = progress
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
        one = self._modules.as_one(module)
        before, after = self._progress, self._progress.followed_by(progress)
        self._capture.refuse_merged_weights(after)
        self._progress = after
        # what is not a sequence may be a number of torch (capturable optimizers) or NumPy
        self._lr = tuple(float(value) for value in lr) if isinstance(lr, Sequence) else (float(lr),)
        self._breaks.at_new_lr(after, self._lr)
        self._snapshot_is_new = False  # also where the capture fails
        self._snapshot_is_new = self._capture.observe(one, before, after, lr=self._lr)
        if loss is not None:
            self.judge(before, loss, gradient_norm)
        return self._snapshot_is_new

    def judge(
        self, before: Progress, loss: Tensor | float | None, gradient_norm: Tensor | float | None = None
    ) -> Damage | None:
        """See whether the loss of the step that was observed last is part of a spike, as `observe` does with `loss`.

        Every rank calls it at every step, also one that has no loss there.

        Returns:
            What is not to be trusted any more, where it is.
        """
        # after the capture: a snapshot that was taken in the middle of a spike is dropped with the others
        damage = self._spikes.judge(before, self._progress, loss, gradient_norm) if self._spikes is not None else None
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

    def merge_is_due(self) -> bool:
        """Whether the last observed step is a merge point: the first snapshot at or after a `merge_every` multiple."""
        window = self.window
        before = window.before_newest if self._snapshot_is_new and window.num_valid >= 2 else None
        return before is not None and self._merge_cadence.crossed(before.progress, self._progress, since=window.since)

    def why_not(self, view: str) -> str | None:
        """Why a view cannot be merged now; None if it can.

        Raises:
            ConfigError: No view of this name is configured.
        """
        try:
            self._resolve(view)
        except WindowNotReadyError as error:
            return str(error)
        return None

    @contextmanager
    def merged(self, module: Modules, view: str) -> Iterator[Recipe]:
        """The merged weights in the live model; the raw weights are back when the block ends, however it ends.

        Random numbers that the block draws are not drawn from the run's: training goes on as it would have without.

        Args:
            module: The model that was observed.
            view: Name of a configured view.

        Yields:
            Which snapshots were merged, and how much of each.

        Raises:
            WindowNotReadyError: Too few valid snapshots; says how many, since when, and when it will be ready.
            ConfigError: No view of this name is configured.
            UnsupportedModelError: The block replaced a parameter in a way that cannot be undone.
        """
        with self.swap(module) as merge_view:
            recipe = merge_view(view)
            with signals.keyboard_interrupt_allowed():
                yield recipe

    def swap(self, module: Modules) -> AbstractContextManager[Callable[[str], Recipe]]:
        """Several views one after another, with one restore at the end, also of what the block itself wrote in place.

        Until the first view is written the weights are raw: the place to measure raw beside the merges, with the same
        random numbers, and without a trace in the run's. Where no view read the whole window, the spread takes one more
        pass when the block has ended.

        Yields:
            A function that writes one view's merge into the live model; it raises what `merged` raises.
        """
        return swapped(self._modules.as_one(module), self._capture, self._spread, self._resolve)

    def span(self, shares: Mapping[str, float]) -> None:
        """From now on `auto` views merge the snapshots that span these shares of the steps since the last break.

        A merger measures nothing: whoever measures nested means chooses, say by `merging.best_span`. A view that is not
        named spans what its configuration begins with.
        """
        self._views.span(shares)

    def evaluate(self, module: Modules, measure: Callable[[], _T]) -> dict[str, _T]:
        """What a function finds with the raw weights in the model, and with those of every view that is ready.

        Args:
            module: The model that was observed.
            measure: Measures the live model. Each time it draws the same random numbers, none of them the run's.

        Returns:
            By name: "raw", and those of the views.
        """
        with self.swap(module) as merge_view:
            found = {RAW: measure()}
            for view in self.views:
                if self.why_not(view) is None:
                    merge_view(view)
                    with signals.keyboard_interrupt_allowed():
                        found[view] = measure()
        return found

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): snapshots before it are not merged."""
        self._breaks.at_phase(self._progress, name)
        if self._spikes is not None:
            self._spikes.restart()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here exactly, as any checkpoint takes it: one text.

        The snapshots themselves become durable files in `window_folder`, each once; those that no state needs any more
        (`keep_windows`) are deleted. Fabric, accelerate and `torch.distributed.checkpoint` call this themselves where
        the merger is a part of what they save. Where the model is sharded every rank must call it at the same point.

        Raises:
            ConfigError: There is no `window_folder`.
            CheckpointError: The disk refuses, or another run uses the folder.
        """
        module = self._modules.one or nn.Module()  # nothing was observed yet, and there is nothing to save
        return self._states.give(lambda folder: self.manifest(module, folder), is_sharded=is_sharded(module))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the merger was that gave the state. Every rank must call it at the same point.

        Args:
            state: What `state_dict` returned. The files that it needs may have been moved to `window_folder`.

        Raises:
            CheckpointError: The state is damaged, one of its files missing or damaged, or it is of another model.
                Nothing was restored. Where `on_missing` is "refill", the window starts empty instead.
            ConfigError: The model is not known yet, or this configuration makes other snapshots.
        """
        if self._modules.one is None:
            raise ConfigError(
                "load_state_dict() was called before the model is known. Allowed: after watch(model), which says whose "
                "parameters the snapshots are of. Call it once the model is on its device, sharded and compiled."
            )
        manifest = None
        try:
            manifest, recorded = self._states.read(state)
            self.restore(manifest, self._modules.one, self._states.find(manifest, recorded))
            self._states.go_on_from(manifest)
        except (CheckpointError, ConfigError) as error:
            if self._on_missing == "error":
                raise type(error)(f"the window cannot be restored: {error} Or set on_missing='refill'.") from error
            self._notices.warn("refill", f"the window starts empty (on_missing: refill). {error}")
            if manifest is not None:
                self.resume_from(manifest.progress)

    def manifest(self, module: Modules, folder: str | PathLike[str]) -> Manifest:
        """All that is needed to go on from here exactly; the tensors of it are durable files when this returns.

        `state_dict` does the same for a checkpoint, and deletes old files. Here both are the caller's business.

        Args:
            module: The model that was observed. Where it is sharded, every rank must call this at the same point.
            folder: Where the files go. What is there already is not written again.

        Raises:
            CheckpointError: The disk refuses.
        """
        one = self._modules.as_one(module)
        return self._saved.save(one, Path(folder), self._progress, lr=self._lr, snapshot_is_new=self._snapshot_is_new)

    def restore(self, manifest: Manifest, module: Modules, folder: str | PathLike[str]) -> None:
        """Go on where another merger was: its window, open block, breaks and counters.

        Args:
            manifest: What `manifest` gave; `Manifest.to_plain` and `from_plain` take it through JSON.
            module: The live model, with the shapes and dtypes that it had; what is frozen in it does not matter.
            folder: Where the files lie.

        Raises:
            ConfigError: This configuration makes other snapshots, or keeps fewer than are held.
            CheckpointError: A file is missing, damaged, or of another model. Nothing was restored.
        """
        self._saved.restore(manifest, self._modules.as_one(module), Path(folder))
        self._progress, self._lr, self._snapshot_is_new = manifest.progress, manifest.lr, manifest.snapshot_is_new

    def close(self) -> None:
        """Give the memory of the window back, and its folder to other runs."""
        self._capture.clear()
        self._states.close()

    def __getstate__(self) -> NoReturn:
        raise CheckpointError(
            "a RollingMerger cannot be pickled: its window is memory and files. Put merger.state_dict() into the "
            "checkpoint, as Fabric does by itself except where it saves shards."
        )

    def _resolve(self, view: str) -> Merge:
        num_lost = int(self._block is not None and self._block.is_invalid)
        return self._views.resolve(view, self.window, self._progress, num_lost=num_lost)
