"""What a run says of itself: three lines at its start, one at each merge where the user wants it, three at its end.

They go where Lightning's own notices go, on rank 0, so that who sees those sees these and who silences those is spared
these. This module knows text and sizes; it changes nothing.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Lightning sets this module's logger and rank, under either of its names
from lightning_utilities.core.rank_zero import rank_zero_info

from pretrain_merge.cadence import Progress, Quantity
from pretrain_merge.callbacks import advice
from pretrain_merge.callbacks.clock import Clock
from pretrain_merge.callbacks.fit import Fit
from pretrain_merge.callbacks.monitors import Monitors
from pretrain_merge.errors import printable
from pretrain_merge.merged_models.best import MOST_HELD
from pretrain_merge.merging.rolling_merger import RollingMerger
from pretrain_merge.parameters import whole_sizes
from pretrain_merge.records import FORECAST, MergeRecord, metric_names
from pretrain_merge.records.disk_use import bytes_text
from pretrain_merge.records.modes import change
from pretrain_merge.stores.choose import likely_store
from pretrain_merge.stores.store import slot_dtype


class _Sizes(NamedTuple):
    """Bytes.

    Attributes:
        slot: One snapshot on this rank.
        snapshot: One snapshot on disk, of all ranks together.
        model: One merged model on disk.
    """

    slot: int
    snapshot: int
    model: int


class Announcements:
    """The lines of one run.

    Args:
        fit: The call.
        folder: Of the run.
    """

    def __init__(self, fit: Fit, folder: Path) -> None:
        self._fit, self._folder = fit, folder
        self._num_merges = self._num_failed = 0

    def begin(self, merger: RollingMerger, since: Progress, monitors: Monitors) -> None:
        """Say what will be kept, merged and written. Collective.

        Args:
            merger: With the window that the run starts from.
            since: Counters at which it starts or goes on.
            monitors: What monitors metrics of ours.
        """
        config, live = self._fit.config, merger.tensors(self._fit.module)
        sizes = _sizes(self._fit.module, live, config.slot_dtype)
        window = config.window * sizes.slot
        # likely: the store is chosen at the first snapshot, by what is free then
        place = likely_store(config.store, list(live.values()), window) if live else config.store
        likely = ", by the memory that is free now" if config.store == "auto" else ""
        self._say(
            f"keeps the last {config.window} snapshots, one every {self._fit.settings.cadence.every}: "
            f"{bytes_text(sizes.slot)} each, {bytes_text(window)} per rank in store {place!r}{likely}."
        )
        self._say(self._when(merger, since))
        self._say(f"files go to {self._folder}: {self._kept(sizes)}; {self._saved(sizes)}.")
        if monitors.checkpoints:
            self._fit.notices.warn(
                "monitor",
                f"a ModelCheckpoint monitors a metric of {config.name!r}. Its checkpoints hold RAW weights; "
                f"the best merged model is kept in {self._folder / 'merged'} by save: {{best: <metric>}}.",
            )
        if wide := advice.why_too_wide(self._fit.settings, last_step(self._fit.trainer)):
            self._fit.notices.warn("wide", wide)

    def merged(self, record: MergeRecord) -> None:
        """One line for a merge, where the user wants one."""
        self._num_merges += 1
        self._num_failed += record.num_failed
        if self._fit.config.verbose:
            self._say("; ".join([f"step {record.step}: {self._compared(record)}", *_forecasts(record)]))

    def end(self, last: MergeRecord | None, best: Path | None) -> None:
        """Say what came of it: the last merge, its forecasts, and where the best merged model is."""
        if last is None:
            return  # why there was none is said by whoever knows
        failed = f" {self._num_failed} evaluations failed." if self._num_failed else ""
        self._say(f"{self._num_merges} merges up to step {last.step}: {self._compared(last)}.{failed}")
        self._say(f"forecast: {'; '.join(_forecasts(last)) or self._why_no_forecast(last)}.")
        if best is not None:
            self._say(f"best merged model, by {self._fit.config.save.best}: {best}")
        else:
            self._say(f"records: {self._folder}. No best model was kept; save: {{best: <metric>}} keeps it.")

    def no_merge(self, merger: RollingMerger, clock: Clock) -> None:
        """Training has ended without a merge: say why."""
        why = _why_no_merge(merger, clock)
        text = f"training ended at step {clock.progress.step} without a merge: {why}"
        self._fit.notices.warn("no merge", text)

    def _say(self, text: str) -> None:
        rank_zero_info(printable(f"{self._fit.config.name}: {text}"))

    def _when(self, merger: RollingMerger, since: Progress) -> str:
        """When the first merge comes, and how many."""
        views = ", ".join(view.name for view in self._fit.settings.views)
        first, number = merge_points_to_come(self._fit, merger, since)
        at = f"step {first.amount}" if first.unit == "steps" else str(first)
        # snapshots before a change are not merged, and every warm-up changes the rate
        steady = ", later if the learning rate changes until then" if self._fit.config.breaks.lr else ""
        if number == 0:
            return f"no merge will be made: training ends before {at}, where the first would be."
        return f"merges {views} from {at} on{steady}{f': up to {number} merges to come' if number else ''}."

    def _kept(self, sizes: _Sizes) -> str:
        """How much the checkpoints that are configured keep of the window, at most."""
        callbacks, limit = self._fit.trainer.checkpoint_callbacks, self._fit.config.keep_windows
        kept = [getattr(item, "save_top_k", 1) for item in callbacks]
        if -1 in kept and limit is None:
            return (
                f"save_top_k=-1 keeps every checkpoint, and so every snapshot that one of them needs, "
                f"{bytes_text(sizes.snapshot)} each, at most {self._fit.config.window} new ones for a checkpoint "
                f"(keep_windows bounds that)"
            )
        # save_last is a copy or a link beside the top k; it may be of another step
        number = math.inf if -1 in kept else sum(kept) + sum(bool(getattr(item, "save_last", 0)) for item in callbacks)
        number = int(number if limit is None else min(number, limit))
        most = bytes_text(number * self._fit.config.window * sizes.snapshot)
        return (
            f"snapshots for {number} checkpoint{'s' * (number > 1)}, {most} at most" if number else "no window is kept"
        )

    def _saved(self, sizes: _Sizes) -> str:
        """How much the merged models take that are kept."""
        save = self._fit.config.save
        # forecasts' own views are never saved
        views = len(self._fit.settings.views) + save.raw
        best = 0 if save.best is None else MOST_HELD if self._fit.config.breaks.spikes else 1
        number = views * save.keep * (save.every is not None) + best + views * save.at_end
        return (
            f"merged models, {bytes_text(number * sizes.model)} at most" if number else "no merged models (save: {…})"
        )

    def _compared(self, record: MergeRecord) -> str:
        """The metric that matters most, of raw and every view."""
        best = self._fit.config.save.best
        # what the user saves by is what the user looks at
        wanted = metric_names.found(best, record.raw) if best is not None else None
        metric = wanted or metric_names.the_loss(record.raw) or next(iter(record.raw), None)
        if metric is None:
            return "nothing was measured"
        raw, asked = record.raw[metric], {view.name for view in self._fit.settings.views}
        views = {view: values[metric] for view, values in record.views.items() if metric in values and view in asked}
        return f"{metric} raw {raw:.5g}{''.join(f', {view} {_beside(value, raw)}' for view, value in views.items())}"

    def _why_no_forecast(self, record: MergeRecord) -> str:
        if not record.raw:
            return "none, since nothing was measured"
        reasons = [record.skipped.get(f"{FORECAST}/{name}") for name in self._fit.settings.forecasts]
        return next((reason.removesuffix(".") for reason in reasons if reason), "none was asked for")


def _why_no_merge(merger: RollingMerger, clock: Clock) -> str:
    """Why training ended without a merge."""
    if clock.num_batches and not clock.num_steps:
        return (
            f"no step of an optimizer on parameters of the model was seen in {clock.num_batches} batches. "
            f"Steps count where an optimizer of torch steps, or one of the Trainer's through Lightning."
        )
    last, num_valid = merger.window.last_break, merger.window.num_valid
    # the reason that matters is why the window did not fill
    if last is not None and num_valid < 2:  # what the view would say of its next chance was never to come
        across = "Set breaks: {lr: off} to merge across changes of the learning rate. "
        return (
            f"a view needs two snapshots at least, and the window held {num_valid} since the break at step "
            f"{last.step} ({last.reason}). {across if last.reason.startswith('learning rate') else ''}"
        ).strip()
    return merger.why_not(merger.views[0]) or "no merge point was reached."


def merge_points_to_come(fit: Fit, merger: RollingMerger, since: Progress) -> tuple[Quantity, int | None]:
    """Where the next merge point comes, and how many there are at most to the end; None where that is not known.

    Breaks to come are not known. No loop over steps: a run has millions.
    """
    settings, window = fit.settings, merger.window
    cadence, merging = settings.cadence, settings.merge_cadence
    unit, origin = cadence.every.unit, window.since

    def at(count: int) -> Progress:
        return Progress(**{"step" if unit == "steps" else unit: count})

    held = window.newest.progress.count(unit) if window.newest is not None and window.num_valid else None
    before = since.count(unit)
    first = held if held is not None else cadence.due_after(at(before), since=origin).amount
    # how many tokens a step has is known when it is made
    if merging.every.unit != unit:
        return merging.due_after(since, since=origin), None
    # the first multiple of merges past the first snapshot, and the snapshot that sees it crossed
    multiple = merging.due_after(at(max(first, before)), since=origin).amount
    due = cadence.due_after(at(multiple - 1), since=origin)
    last = last_step(fit.trainer)
    if unit != "steps" or math.isinf(last):
        return due, None
    begin, end = at(max(first, before)), at(int(last))
    number = cadence.index(end, since=origin) - cadence.index(begin, since=origin)
    if not number or due.amount > end.step:
        return due, 0
    newest = at(cadence.due_after(begin, times=number, since=origin).amount)
    multiples = merging.index(newest, since=origin) - merging.index(begin, since=origin)
    # where intervals grow past those of merges, one snapshot sees several multiples crossed: so many at most
    return due, min(number, multiples)


def last_step(trainer: Any) -> float:
    """The last step of `fit` by what the Trainer was told; infinite where it was told nothing."""
    # -1 is without end, and Lightning lets both limits stand: the first that is reached ends
    by_steps = float(trainer.max_steps) if trainer.max_steps > 0 else math.inf
    if trainer.max_epochs in (None, -1) or math.isinf(trainer.num_training_batches):
        return by_steps
    batches = trainer.max_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return min(by_steps, float(batches))


def _sizes(module: Any, live: Mapping[str, torch.Tensor], dtype: str | None) -> _Sizes:
    smaller = getattr(torch, dtype) if dtype else None
    widths = [slot_dtype(tensor.dtype, smaller).itemsize for tensor in live.values()]
    slot = sum(width * tensor.numel() for width, tensor in zip(widths, live.values(), strict=True))
    snapshot = sum(width * number for width, number in zip(widths, whole_sizes(module, live), strict=True))
    # of a sharded parameter, `numel` is that of the whole
    model = sum(item.numel() * item.element_size() for item in [*module.parameters(), *module.buffers()])
    return _Sizes(slot, snapshot, model)


def _beside(value: float, raw: float) -> str:
    # a share of nothing, or of what overflows, is left out
    return f"{value:.5g}" if (share := change(value, raw)) is None else f"{value:.5g} ({share:+.1%})"


def _forecasts(record: MergeRecord) -> list[str]:
    return [
        f"{name} {metric} {value.mean:.5g} ({value.low:.5g} to {value.high:.5g}) at step {value.step}"
        for name, expected in record.forecasts.items()
        for metric, value in expected.items()
    ]
