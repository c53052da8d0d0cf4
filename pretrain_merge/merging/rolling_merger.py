"""The state machine that any training loop can drive: observe every step, merge when it is due, raw weights back.

`RollingMerger` joins the parts below it: the cadence says when, the window which, the coefficients how much, the store
where, and `weighted_sum_` does the arithmetic. It knows no trainer, no evaluation and no logger.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain_merge import coefficients, config, parameters
from pretrain_merge.cadence import Progress
from pretrain_merge.errors import CoefficientError, ConfigError, ProgressError, WindowNotReadyError
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.records import Recipe
from pretrain_merge.resume import saved_block
from pretrain_merge.resume.manifest import Manifest, OpenBlock
from pretrain_merge.resume.window_files import WindowFiles
from pretrain_merge.runtime import ranks, signals
from pretrain_merge.runtime.log import Notices
from pretrain_merge.window.block_mean import BlockMean
from pretrain_merge.window.stored import Snapshots
from pretrain_merge.window.window import Snapshot, Window


class RollingMerger:
    """A rolling window of snapshots of one model, and their merges.

    Args:
        **options: The keys of `pretrain_merge.config.WindowConfig`: `window`, `every`, `start`, `merge_every`,
            `views`, `average`, `sample_every`, `lr_tolerance`, `breaks`, `merge_buffers`, `batch_norm`, `store`,
            `store_folder`, `slot_dtype`.

    Raises:
        ConfigError: An unknown key or an impossible value.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> merger = RollingMerger(window=4, every=10)
    >>> for step in range(1, 41):
    ...     with torch.no_grad():
    ...         _ = model.weight.fill_(step)  # stands for an optimizer step
    ...     _ = merger.observe(model, step)
    >>> with merger.merged(model, "sma"):  # mean of steps 10, 20, 30, 40
    ...     model.weight.tolist()
    [[25.0, 25.0]]
    >>> model.weight.tolist()
    [[40.0, 40.0]]
    """

    def __init__(self, **options: Any) -> None:
        settings = config.build(config.WindowConfig, options)
        self._settings = settings
        self._cadence = config.snapshot_cadence(settings)
        self._merge_cadence = config.merge_cadence(settings) or self._cadence
        self._views = {view.name: view for view in config.parse_views(settings)}
        self._notices = Notices()
        self._block = BlockMean(settings.sample_every) if settings.average == "block" else None
        self._progress = Progress()
        self._lr: tuple[float, ...] = ()
        self._segment_lr: tuple[float, ...] = ()
        self._phase = ""
        self._snapshot_is_new = False
        self._spread: Spread | None = None
        self._counts: list[float] | None = None
        self._segment_of_all = 0
        self._snapshots = Snapshots(settings)
        self._kept_block: tuple[Path, Progress, OpenBlock] | None = None  # as it was written last, and when
        self.num_refused = 0

    @property
    def window(self) -> Window:
        """Which snapshots are held, and which of them are valid."""
        return self._snapshots.window

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
        return self._phase

    @property
    def spread(self) -> float:
        """Relative RMS distance of the valid snapshots from their mean, as the last merge measured it; NaN before.

        Of what this rank holds: of the whole model, but for shards. Add `spread_sums` over ranks for that.
        """
        return self._spread.relative_rms if self._spread is not None else float("nan")

    @property
    def spread_sums(self) -> Spread | None:
        """What `spread` is made of. Where parameters are sharded, sums over ranks are those of the whole model.

        A merge communicates nothing, so these are of this rank alone; what n ranks hold alike counts 1 / n on each.
        """
        return self._spread

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the configured views."""
        return tuple(self._views)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The live tensors that merges are written into, by name."""
        return self._live(module)

    def go_on_from(self, progress: Progress) -> None:
        """Counters at which a resumed run starts, so that what lies behind it is not taken for a jump."""
        self._progress = progress
        if self._block is not None and progress.count(self._cadence.every.unit) % self._cadence.every.amount:
            self._block.skip()  # the open interval began in the run before

    def observe(self, module: nn.Module, progress: Progress | int, *, lr: float | Sequence[float] = ()) -> bool:
        """Look at the model after an optimizer step; takes a snapshot where one is due.

        Args:
            module: The live model. It is read, never written.
            progress: Totals since the start of the run; an integer is a number of steps.
            lr: The learning rate that this step used, one per parameter group; a change is a break.

        Returns:
            Whether a snapshot was taken.

        Raises:
            ProgressError: A counter went backwards.
        """
        before, self._progress = self._progress, _later(self._progress, progress)
        # what is no sequence may be a number of torch (capturable optimizers) or NumPy
        self._lr = tuple(float(value) for value in lr) if isinstance(lr, Sequence) else (float(lr),)
        self._break_on_new_lr()
        due = self._cadence.crossed(before, self._progress)
        self._snapshot_is_new = False
        # a handler that saves a checkpoint must not find a slot half written or a sum that was not counted yet
        touches = due or (self._block is not None and self._block.samples_at(self._progress.step))
        with signals.held() if touches else nullcontext():
            if self._block is not None:
                self._snapshot_is_new = self._observe_block(self._block, module, before, due)
            elif due:
                self._snapshot_is_new = self._capture(module)
        return self._snapshot_is_new

    def merge_is_due(self) -> bool:
        """Whether the last observed step is a merge point: the first snapshot at or after a `merge_every` multiple."""
        if not self._snapshot_is_new or len(self.window.valid) < 2:
            return False
        return self._merge_cadence.crossed(self.window.snapshots[-2].progress, self._progress)

    def why_not(self, view: str) -> str | None:
        """Why a view cannot be merged now; None if it can.

        Raises:
            ConfigError: No view of this name is configured.
        """
        if view not in self._views:
            known = ", ".join(self._views)
            raise ConfigError(
                f"view {view!r} is not configured{config.did_you_mean(view, self._views)} Configured: {known}."
            )
        needed, valid = self._num_needed(view), self.window.valid
        if len(valid) >= needed:
            return self._why_no_recipe(view)
        steps = f" (steps {valid[0].progress.step} to {valid[-1].progress.step})" if valid else ""
        last = self.window.last_break
        since = f" since the break at step {last.step} ({last.reason})" if last else ""
        lost = self._block is not None and self._block.is_spoiled
        due = self._cadence.due_after(self._progress, times=needed - len(valid) + lost)
        ready = f"step {due.amount}" if due.unit == "steps" else str(due)
        others = [repr(name) for name in self._views if len(valid) >= self._num_needed(name)]
        now = f"; {', '.join(others)} {'is' if len(others) == 1 else 'are'} ready now" if others else ""
        return (
            f"view {view!r} needs {needed} snapshots and the window holds {len(valid)}{steps}{since}. "
            f"It will be ready at {ready}{now}."
        )

    @contextmanager
    def merged(self, module: nn.Module, view: str) -> Iterator[Recipe]:
        """The merged weights in the live model; the raw weights are back when the block ends, however it ends.

        Args:
            module: The model that was observed.
            view: Name of a configured view.

        Yields:
            Which snapshots were merged, and how much of each.

        Raises:
            WindowNotReadyError: Too few valid snapshots; says how many, since when, and when it will be ready.
            ConfigError: No view of this name is configured.
        """
        with self.swapping(module) as put:
            recipe = put(view)
            with signals.ctrl_c_breaks_in():
                yield recipe

    @contextmanager
    def swapping(self, module: nn.Module) -> Iterator[Callable[[str], Recipe]]:
        """Several views one after another, with one restore at the end, also of what the block itself wrote in place.

        Yields:
            A function that writes one view's merge into the live model; it raises what `merged` raises.
        """
        live = list(self._live(module).values())
        raw_slot = self._snapshots.slot_that_is_raw(live, self._progress)
        scratch = [tensor.clone() for tensor in live] if raw_slot is None else []
        before = parameters.identities(live)
        written: list[str] = []

        def put(view: str) -> Recipe:
            if reason := self.why_not(view):
                raise WindowNotReadyError(reason)
            chosen = self._chosen(view)
            recipe = self._recipe(view, chosen)
            first = not written
            written.append(view)
            parameters.reshard(module)  # P18
            valid = self.window.valid
            if first and len(chosen) < len(valid):  # the spread speaks of the whole window
                self._merge_into(live, valid, coefficients.sma(len(valid)))
            self._merge_into(live, chosen, recipe.coefficients)
            return recipe

        def restore() -> None:
            if written or parameters.identities(live) != before:
                parameters.reshard(module)
                if raw_slot is None:
                    parameters.copy_(live, scratch)
                else:
                    self._snapshots.put_back(live, raw_slot)

        with signals.held():
            try:
                yield put
            finally:
                restore()

    def mark_phase(self, name: str) -> None:
        """Say that something changed that the weights will show (a data switch): snapshots before it are not merged."""
        self._phase = name
        self._break(f"phase {name!r}")

    def manifest(self, module: nn.Module, folder: Path) -> Manifest:
        """All that is needed to go on from here exactly; the tensors of it are durable files when this returns.

        Args:
            module: The model that was observed. Where it is sharded, every rank must call this at the same point.
            folder: Where the files go. What is there already is not written again.

        Raises:
            CheckpointError: The disk refuses.
        """
        files = WindowFiles(folder, module)
        return Manifest(
            settings=self._what_a_snapshot_is(),
            progress=self._progress,
            lr=self._lr,
            segment_lr=self._segment_lr,
            phase=self._phase,
            num_refused=self.num_refused,
            segment=self.window.segment,
            last_break=self.window.last_break,
            snapshot_is_new=self._snapshot_is_new,
            snapshots=self._snapshots.keep(files),
            block=self._keep_block(self._block, files) if self._block is not None else None,
        )

    def restore(self, manifest: Manifest, module: nn.Module, folder: Path) -> None:
        """Go on where another merger was: its window, open block, breaks and counters.

        Args:
            manifest: What `manifest` gave.
            module: The live model, with the shapes and dtypes that it had.
            folder: Where the files lie.

        Raises:
            ConfigError: This configuration makes other snapshots, or keeps fewer than are held.
            CheckpointError: A file is missing, damaged, or of another model. Nothing was restored.
        """
        self._refuse_other_settings(manifest)
        live = self._live(module)
        files = WindowFiles(folder, module)
        try:
            self.window.go_on_from(manifest.segment, manifest.last_break)
            self._counts = _counts_over_ranks(module, live)
            self._snapshots.load(manifest.snapshots, live, files)
            if self._block is not None and manifest.block is not None:
                saved_block.load(self._block, manifest.block, live, files)
        except BaseException:
            self.close()
            self.window.go_on_from(0, None)
            raise
        self._progress, self._phase, self.num_refused = manifest.progress, manifest.phase, manifest.num_refused
        self._lr, self._segment_lr = manifest.lr, manifest.segment_lr
        self._snapshot_is_new = manifest.snapshot_is_new
        self._segment_of_all = manifest.segment

    def close(self) -> None:
        """Give the memory of the window back."""
        self._snapshots.clear()
        if self._block is not None:
            self._block = BlockMean(self._settings.sample_every)

    def _keep_block(self, block: BlockMean, files: WindowFiles) -> OpenBlock:
        """Once per step, however many checkpoints are saved at it: a block is a whole model in float32."""
        if self._kept_block is None or self._kept_block[:2] != (files.folder, self._progress):
            kept = saved_block.keep(block, files, self._progress.step)
            self._kept_block = (files.folder, self._progress, kept)
        return self._kept_block[2]

    def _what_a_snapshot_is(self) -> dict[str, Any]:
        settings = self._settings
        keys = ["average", "slot_dtype", "batch_norm", *(["sample_every"] if self._block is not None else [])]
        chosen = {key: getattr(settings, key) for key in keys}
        return chosen | {"every": str(self._cadence.every), "merge_buffers": list(settings.merge_buffers)}

    def _refuse_other_settings(self, manifest: Manifest) -> None:
        here = self._what_a_snapshot_is()
        for key in sorted(here.keys() | manifest.settings.keys()):
            if here.get(key) != manifest.settings.get(key):
                raise ConfigError(
                    f"{key}: {here.get(key)!r}, and the snapshots of the resumed run were taken with "
                    f"{manifest.settings.get(key)!r}. Set it back, or start with an empty window by "
                    f"on_missing='refill'."
                )
        if len(manifest.snapshots) > self.window.size:
            raise ConfigError(
                f"window: {self.window.size}, and the resumed run holds {len(manifest.snapshots)} snapshots. Keep at "
                f"least as many, or start with an empty window by on_missing='refill'."
            )

    def _why_no_recipe(self, view: str) -> str | None:
        try:
            self._recipe(view, self._chosen(view))
        except CoefficientError as error:  # a kind that asks for even spacing, say
            return f"view {view!r}: {error}"
        return None

    def _chosen(self, view: str) -> tuple[Snapshot, ...]:
        return self.window.valid[-(self._views[view].last or self.window.size) :]

    def _num_needed(self, view: str) -> int:
        return self._views[view].last or 2

    def _live(self, module: nn.Module) -> dict[str, Tensor]:
        settings = self._settings
        return parameters.mergeable_tensors(
            module, merge_buffers=settings.merge_buffers, batch_norm=settings.batch_norm
        )

    def _break_on_new_lr(self) -> None:
        if self._settings.breaks.lr and _differs(self._lr, self._segment_lr, self._settings.lr_tolerance):
            if self._segment_lr:
                changed = f"learning rate changed from {_listed(self._segment_lr)} to {_listed(self._lr)}"
                self._break(changed, said_as="lr")
            self._segment_lr = self._lr

    def _break(self, reason: str, *, said_as: str | None = None) -> None:
        step = self._progress.step
        num_lost = self.window.break_at(step, reason)
        if self._block is not None:
            self._block.spoil()
        if num_lost:
            self._notices.once(
                said_as or reason,
                f"break at step {step} ({reason}): {num_lost} snapshots are no longer merged; the window refills.",
            )

    def _observe_block(self, block: BlockMean, module: nn.Module, before: Progress, due: bool) -> bool:
        # an iterate beyond the multiple that it crossed belongs to the next block: the block is ((k-1)V, kV]
        ends = self._cadence.index(self._progress) > self._cadence.index(before)
        overshoots = ends and self._progress.count(self._cadence.every.unit) % self._cadence.every.amount > 0
        unseen = self._progress.step > before.step + 1
        if unseen:
            block.skip()
        if not overshoots:
            block.sample(self._progress.step, lambda: self._live(module))
        taken = due and self._capture(module)
        if ends:
            block.restart()
        if overshoots:
            if unseen:  # some of what was not seen may belong to the new block
                block.skip()
            block.sample(self._progress.step, lambda: self._live(module))
        return taken

    def _capture(self, module: nn.Module) -> bool:
        with ranks.together(f"take the snapshot of step {self._progress.step}") as agree:
            live = self._live(module)
            if self._snapshots.are_of_other_tensors(live):
                self._break("the set of trainable parameters changed")
                self._snapshots.clear()
                self._counts = None
            if not self._all_ranks_take(agree, list(live.values())):
                return False
            if self._counts is None:
                self._counts = _counts_over_ranks(module, live)
            source = self._block.mean() if self._block is not None else list(live.values())
            self._snapshots.capture(live, source, self._progress, lr=self._lr, phase=self._phase)
        return True

    def _all_ranks_take(self, agree: ranks.Agree, live: Sequence[Tensor]) -> bool:
        """One decision for all ranks: a break on one is a break on all, and what one cannot take nobody takes."""
        is_whole = self._block is None or self._block.is_whole
        is_finite = is_whole and parameters.all_finite(live if self._block is None else self._block.sums)
        has_broken = self.window.segment != self._segment_of_all
        num_broken, num_partial, num_non_finite = agree(has_broken, not is_whole, is_whole and not is_finite)
        if num_broken and not has_broken:
            self._break("another rank had one")
        self._segment_of_all = self.window.segment
        if num_partial:
            self._notices.once(
                f"block {self.window.segment}",
                f"step {self._progress.step}: no block mean, since its interval was not observed from its start.",
            )
        elif num_non_finite:
            self._refuse_non_finite()
            self._segment_of_all = self.window.segment
        return not num_partial and not num_non_finite

    def _refuse_non_finite(self) -> None:
        self.num_refused += 1
        self._break("a snapshot held NaN or infinity")
        self._notices.once(
            "non-finite",
            f"step {self._progress.step}: the snapshot holds NaN or infinity and was refused; so is every further one "
            f"until the weights are finite. Records count them as `refused`.",
        )

    def _recipe(self, view: str, chosen: Sequence[Snapshot]) -> Recipe:
        times = [item.progress.count(self._cadence.every.unit) for item in chosen]
        kind, params = self._views[view].kind, self._views[view].params
        return Recipe(
            tuple(item.progress.step for item in chosen),
            coefficients.compute(kind, len(chosen), times=times, **params),
        )

    def _merge_into(self, live: Sequence[Tensor], chosen: Sequence[Snapshot], weights: Sequence[float]) -> None:
        is_whole_window = len(chosen) == len(self.window.valid)
        measured = self._snapshots.merge_(live, chosen, weights, spread=is_whole_window and (self._counts or True))
        self._spread = self._spread if measured is None else measured


def _counts_over_ranks(module: nn.Module, live: Mapping[str, Tensor]) -> list[float]:
    """How much each local tensor counts in a sum over ranks: 1 / n where n ranks hold the same elements.

    Every element of a parameter is held by as many ranks as every other, however meshes divide it, so n is what all
    ranks hold together over the size of the whole. Where nothing is sharded every rank has the whole model: 1.
    """
    if not parameters.is_sharded(module):
        return [1.0] * len(live)
    held = ranks.sum_over_ranks([tensor.numel() for tensor in live.values()])
    pairs = zip(parameters.whole_sizes(module, live), held, strict=True)
    return [whole / together if together else 1.0 for whole, together in pairs]


def _listed(lr: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(lr))


def _differs(lr: Sequence[float], reference: Sequence[float], tolerance: float) -> bool:
    if len(lr) != len(reference):
        return True
    return any(not abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in zip(lr, reference, strict=True))


def _later(before: Progress, given: Progress | int) -> Progress:
    after = given if isinstance(given, Progress) else Progress(step=given)
    if after.step <= before.step or after.samples < before.samples or after.tokens < before.tokens:
        raise ProgressError(
            f"observe() was given {after} after {before}. Steps must grow and other counters must not shrink; call it "
            f"once after each optimizer step with totals since the start of the run."
        )
    return after
