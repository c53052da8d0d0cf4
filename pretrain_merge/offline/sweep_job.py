"""A sweep with everything decided: evaluated point by point, compared, published; gone on with after a kill.

This module knows the order of things. What is merged where is `schedule`'s business, how it is evaluated that of a
bench. Its records are those of a live run, so that whatever reads them reads these.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pretrain_merge._version import __version__
from pretrain_merge.config import WindowConfig, WindowSettings, parse_window_settings
from pretrain_merge.errors import ConfigError
from pretrain_merge.files import atomic
from pretrain_merge.offline import agreement, partial
from pretrain_merge.offline.agreement import Output
from pretrain_merge.offline.candidates import Bench, Candidate, Measured
from pretrain_merge.offline.comparison import Comparison, compare
from pretrain_merge.offline.options import find, find_base, new_folder, refuse_text
from pretrain_merge.offline.schedule import (
    LATEST,
    Point,
    SweptView,
    in_order,
    merge_points,
    nested_views,
    swept_views,
)
from pretrain_merge.offline.tensors import Source
from pretrain_merge.offline.ways import EvaluateLike, bench, described
from pretrain_merge.records import RAW, MergeRecord, Recipe, append_record, metric_names, read_records
from pretrain_merge.records.jsonl import keep_records_until
from pretrain_merge.records.modes import Mode, mode_of

RECORDS, SUMMARY = "merges.jsonl", "sweep.json"
_SCRATCH = ".scratch.tmp"  # goes with what else a killed process left half written
_NAME = "merge"  # of the callback, by default
Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        records: One for each merge point, oldest first, as `merges.jsonl` in its folder has them.
        comparison: Which view is best by the metric, and how surely.
    """

    records: tuple[MergeRecord, ...]
    comparison: Comparison


@dataclass(frozen=True)
class SweepJob:
    """A sweep with everything decided but how to evaluate.

    Attributes:
        sources: In the order of their steps.
        views: What is merged.
        points: Where, and of which checkpoints.
        outputs: Every tensor of a merge.
        base: Gives what the sources lack.
        policy: Options that decide what is measured.
        out: The folder.
    """

    sources: tuple[Source, ...]
    views: tuple[SweptView, ...]
    points: tuple[Point, ...]
    outputs: Mapping[str, Output]
    base: Source | None
    policy: Mapping[str, Any]
    out: Path

    @classmethod
    def of(
        cls, places: Sequence[str | Path], out: str | Path, keys: Mapping[str, Any], *,
        intervals: Sequence[int] = (1, 2), steps: Sequence[int] | None = None, base: str | Path | None = None,
        newest: Sequence[str] = (), average: Sequence[str] = (),
    ) -> "SweepJob":  # fmt: skip
        """Open, compare and choose; the options are those of `sweep_checkpoints`, the callback's own as `keys`.

        Raises:
            PretrainMergeError: As `sweep_checkpoints` says.
        """
        target = new_folder(out)
        refuse_text(newest=newest, average=average)
        sources = in_order(find(places), steps)
        settings = _settings(sources, keys)
        views = swept_views(settings.views, intervals, settings.config.window)
        points = merge_points(sources, views, settings)
        given = find_base(base)
        for source in sources:
            agreement.check_readable(source)
        outputs = agreement.agree(
            sources, dtype=None, newest=newest, average=average, on_missing="error", base=given
        )  # fmt: skip
        agreement.refuse_idle([*outputs], newest=newest, average=average)
        policy = {"newest": list(newest), "average": list(average), "intervals": list(intervals), **keys}
        return cls(sources, views, tuple(points), outputs, given, policy, target)

    @property
    def num_evaluations(self) -> int:
        """Of all points; what two views have in common is evaluated once."""
        return sum(len(_candidates(point)) for point in self.points)

    def run(self, evaluate: EvaluateLike, metric: str | None, mode: Mode | None, progress: Progress) -> Sweep:
        """Evaluate what is not done yet, then publish the folder."""
        folder = self.out.with_name(f".{self.out.name}.partial")
        with partial.locked(self.out.with_name(f".{self.out.name}.lock")):
            partial.prepare(folder, self._identity(evaluate))
            with partial.removed_if_empty(folder, RECORDS):
                self._evaluate(folder, evaluate, metric, progress)
                # from the disk, so that those of earlier tries and of this one are compared alike
                records = read_records(folder / RECORDS)
                chosen = _chosen(metric, records[0])
                comparison = compare(records, chosen, larger_is_better=(mode or mode_of(chosen)) == "max")
                # before the folder has its name: whoever finds it finds the verdict too
                atomic.write(folder / SUMMARY, json.dumps(self._summary(comparison), indent=2) + "\n")
                partial.publish(folder, self.out)
        return Sweep(tuple(records), comparison)

    def _evaluate(self, folder: Path, evaluate: EvaluateLike, metric: str | None, progress: Progress) -> None:
        """Append a record for each point behind the last one that is there."""
        # a kill amid a line leaves half of it, which this cuts off
        last = keep_records_until(folder / RECORDS, LATEST)
        left = [point for point in self.points if self._step(point) > last]
        total = self.num_evaluations
        done = total - sum(len(_candidates(point)) for point in left)
        options = {"newest": self.policy["newest"], "average": self.policy["average"]}
        ties = agreement.common_ties(self.sources)
        with bench(evaluate, self.outputs, ties, self.base, folder / _SCRATCH, options) as way:
            for point in left:
                way.begin([self.sources[index] for index in point.valid])
                # early on several views are one merge: the mean of all is that of two where two are held
                measured: dict[_Merge, Measured] = {}
                for merge, label in _candidates(point).items():
                    progress(done, total)
                    indices, coefficients = merge
                    sources = tuple(self.sources[index] for index in indices)
                    what = f"{label} at step {self._step(point)}"
                    measured[merge] = way.measure(Candidate(what, sources, coefficients))
                    done += 1
                record = self._record(point, measured, way)
                _chosen(metric, record)  # a metric that is not there is said now, and not after hours
                append_record(folder / RECORDS, record)
        progress(done, total)

    def _record(self, point: Point, measured: Mapping["_Merge", Measured], way: Bench) -> MergeRecord:
        """That of a live run at this point, but for times, which no two sweeps have in common."""
        found = {view: measured[_key(*merge)] for view, merge in point.merges.items()}
        # of the whole window, as a live run's, also where every view is of fewer checkpoints
        whole = [found[view].spread for view, (indices, _) in point.merges.items() if indices == point.valid]
        spread = whole[0] if whole else way.spread([self.sources[index] for index in point.valid])
        return MergeRecord(
            name=_NAME,
            step=self._step(point),
            # a checkpoint does not say how many it had seen
            samples=0,
            tokens=0,
            window=len(point.valid),
            spread=spread,
            raw=measured[_raw(point)].metrics,
            views={view: item.metrics for view, item in found.items()},
            recipes={view: recipe for view, (_, recipe) in point.merges.items()},
            skipped=point.skipped,
            lr=self.sources[point.newest].lr,
            since=point.since,
            why_since=point.why_since,
        )

    def _step(self, point: Point) -> int:
        return self.sources[point.newest].step or 0

    def _identity(self, evaluate: EvaluateLike) -> dict[str, Any]:
        """What must be the same for finished points to be kept. What a function or a program does is not known."""
        everyone = [*self.sources, *([self.base] if self.base is not None else [])]
        return {
            "version": __version__,
            "files": {file: partial.fingerprint(file) for source in everyone for file in source.files},
            "steps": [source.step for source in self.sources],
            "policy": dict(self.policy),
            "evaluate": described(evaluate),
        }

    def _summary(self, comparison: Comparison) -> dict[str, Any]:
        return {
            "metric": comparison.metric,
            "best": comparison.best,
            "gains": {view: gain.to_plain() for view, gain in comparison.gains.items()},
            "next": comparison.next,
            "margin": comparison.margin.to_plain(),
            "left_out": list(comparison.left_out),
            "sources": [{"place": source.place, "step": source.step} for source in self.sources],
            "base": self.base.place if self.base is not None else None,
        }


_Merge: TypeAlias = tuple[tuple[int, ...], tuple[float, ...]]  # indices of checkpoints and how much of each


def _key(indices: Sequence[int], recipe: Recipe) -> _Merge:
    return tuple(indices), recipe.coefficients


def _raw(point: Point) -> _Merge:
    return (point.newest,), (1.0,)


def _candidates(point: Point) -> dict[_Merge, str]:
    """What is evaluated, raw first, and a name for each; views that are the same merge have one of theirs."""
    # a view of one checkpoint is raw itself, and is not evaluated again
    found = {_raw(point): RAW}
    for view, (indices, recipe) in point.merges.items():
        found.setdefault(_key(indices, recipe), view)
    return found


def _settings(sources: Sequence[Source], keys: Mapping[str, Any]) -> WindowSettings:
    """Keys of the callback; every checkpoint is used where no interval was given."""
    given = {key: value for key, value in keys.items() if value is not None or key == "span"}
    # each step is a multiple of their common divisor, so each checkpoint is a snapshot
    given.setdefault("every", math.gcd(*(source.step or 0 for source in sources)) or 1)
    given.setdefault("views", nested_views(given.get("window", WindowConfig.window)))
    settings = parse_window_settings(given)
    for key, cadence in (("every", settings.cadence), ("merge_every", settings.merge_cadence)):
        if cadence.every.unit != "steps" or cadence.start.unit != "steps":
            raise ConfigError(
                f"{key}: {keys.get(key)!r} is not in steps, and a checkpoint says its step, not its samples or tokens. "
                f"Give every, start and merge_every in steps."
            )
    return settings


def _chosen(metric: str | None, record: MergeRecord) -> str:
    """The metric by which views are compared, as it is called in the records."""
    if metric is not None:
        return metric_names.measured_name("metric", metric, record.raw)
    return metric_names.the_loss(record.raw) or next(iter(record.raw))
