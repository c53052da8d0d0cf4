"""The state machine that any training loop can drive: observe every step, merge when it is due, raw weights back.

`RollingMerger` adds merges to a window that fills and is saved: the views say which snapshots and how much of each, and
the swap writes their sums into the live model. It knows no trainer, no evaluation and no logger.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from typing import Any, TypeVar

from pretrain_merge import config
from pretrain_merge.errors import WindowNotReadyError
from pretrain_merge.kernels.weighted_sum import Spread
from pretrain_merge.merging.swap import WindowSpread, swapped
from pretrain_merge.merging.views import Merge, Views
from pretrain_merge.parameters import Masters, Modules
from pretrain_merge.records import RAW, Recipe
from pretrain_merge.resume.durable import DurableWindow
from pretrain_merge.runtime import signals

_T = TypeVar("_T")


class RollingMerger(DurableWindow):
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

    Attributes:
        window: Which snapshots are held, and which of them are valid.
        progress: Counters of the last observed step.
        lr: Its learning rates, per parameter group.
        phase: Name given to the last `mark_phase`, or empty.
        num_refused: Snapshots refused so far because they held NaN or infinity.
        num_spikes: Spikes of the training loss so far.
        views: Names of the configured views.
        spread: How far the valid snapshots lie from their mean, as it was measured last.
        spread_sums: What `spread` is made of, to be added over ranks where parameters are sharded.

    Raises:
        ConfigError: An unknown key or an impossible value.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
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
        super().__init__(parsed, masters, window_folder=window_folder, keep_windows=keep_windows, on_missing=on_missing)
        self._merge_cadence = parsed.merge_cadence  # when merges are due
        self._views = Views(parsed.views, parsed.cadence, parsed.config.average)  # which snapshots, how much of each
        self._spread = WindowSpread()  # of the whole window, as it was measured last

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

    def merge_is_due(self) -> bool:
        """Whether the last observed step is a merge point: the first snapshot at or after a `merge_every` multiple."""
        if not self._snapshot_is_new:
            return False  # as on nearly every step
        window = self.window
        before = window.before_newest if window.num_valid >= 2 else None
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

        For an `extrapolated` view the number is its step. A merger measures nothing: whoever measures nested means
        chooses, say by `merging.best_span`. A view that is not named does what its configuration begins with.
        """
        self._views.choose(shares)

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

    def _resolve(self, view: str) -> Merge:
        num_lost = int(self._block is not None and self._block.is_invalid)
        return self._views.resolve(view, self.window, self._progress, num_lost=num_lost)
