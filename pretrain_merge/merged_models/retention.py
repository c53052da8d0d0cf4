"""Which merged models are written to disk, and which old ones go.

This module knows `save: {every, keep, best, mode, at_end}` and the names of folders. It writes what is in the module
when it is called; putting merged weights there and taking them out is the caller's. On several ranks every rank keeps
the same books, and rank 0 deletes and renames.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig, save_cadence
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.files.folders import discard, move_aside
from pretrain_merge.merged_models.choosing import BEST
from pretrain_merge.merged_models.folder_users import FolderUsers, NobodyUses
from pretrain_merge.merged_models.merged import holds_weights_of, save_merged
from pretrain_merge.merged_models.provenance import add_reasons, read_provenance
from pretrain_merge.records import RAW, Recipe, metric_names
from pretrain_merge.runtime import ranks

# of what may be deleted; whatever else lies there is the user's
_NAME = re.compile(r"step-[0-9]{8,20}-[^/]+")


@dataclass(frozen=True)
class SavedModels:
    """What a checkpoint says of merged models.

    Attributes:
        start: Counters at which the run began.
        last_merge: By view, counters of its last merge.
        periodic: By view, names of the folders that `save.every` keeps, oldest first.
        best: Name of the best model's folder; a path where that lies in the folder of a run before this one.
        best_score: Its metric, lower is better.
        surplus: Names of folders that nobody wants any more, and that somebody was using yet.
    """

    start: Progress = field(default_factory=Progress)
    last_merge: Mapping[str, Progress] = field(default_factory=dict)
    periodic: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    best: str | None = None
    best_score: float | None = None
    surplus: tuple[str, ...] = ()


def will_save(config: SaveConfig) -> bool:
    """Whether any merged model is to be written."""
    return config.every is not None or config.best is not None or config.at_end


class MergedModels:
    """The folder `merged/` of one run. Nothing outside it is ever deleted, whatever a checkpoint names.

    Args:
        folder: Where `step-…-<view>` folders go.
        config: What to save.
        settings: The whole configuration as plain values, for provenance.
        start: Counters at which the run starts or goes on.

    Attributes:
        users: Told of each model that is published, and asked before one is deleted.
    """

    def __init__(
        self, folder: Path, config: SaveConfig, settings: Mapping[str, Any], start: Progress | None = None
    ) -> None:
        self.folder = folder.absolute()  # the user's code may change the working folder
        self._config = config
        self._settings = settings
        self._cadence = save_cadence(config)
        self._start = start or Progress()
        self._last_merge: dict[str, Progress] = {}
        self._periodic: dict[str, list[Path]] = {}
        self._best: tuple[float, Path] | None = None
        self._surplus: list[Path] = []  # to be deleted once nobody uses them
        self.users: FolderUsers = NobodyUses()

    @property
    def best_path(self) -> Path | None:
        """The best merged model so far, by `save.best`."""
        return self._best[1] if self._best else None

    def state(self) -> SavedModels:
        """What is on disk for which reason."""
        periodic = {view: tuple(path.name for path in saved) for view, saved in self._periodic.items()}
        start, last = self._start, dict(self._last_merge)
        surplus = tuple(path.name for path in self._surplus)
        if self._best is None:
            return SavedModels(start, last, periodic, surplus=surplus)
        score, path = self._best
        best = path.name if path.parent == self.folder else str(path)
        return SavedModels(start, last, periodic, best, score, surplus)

    def resume_from(self, saved: SavedModels, before: Path) -> None:
        """Go on with what an earlier part of the run saved, as far as it is still there.

        Args:
            saved: What `state` gave.
            before: The folder `merged/` then. Where that is another one, its models stay as they are.
        """
        self._start, self._last_merge = saved.start, dict(saved.last_merge)
        found = {view: [self.folder / name for name in names] for view, names in saved.periodic.items()}
        # here first: of a folder that was copied, the copy belongs to this run
        places = [] if saved.best is None else [folder / saved.best for folder in (self.folder, before.absolute())]
        there = ranks.gather({path for path in chain(places, *found.values()) if path.exists()})[0]  # all decide alike
        self._periodic = {view: [path for path in paths if path in there] for view, paths in found.items()}
        best = next((path for path in places if path in there), None)
        self._best = (saved.best_score, best) if best is not None and saved.best_score is not None else None
        self._surplus = [self.folder / name for name in saved.surplus]
        with ranks.all_or_none("name the best merged model"):
            self._name_best()

    @property
    def kept(self) -> list[Path]:
        """Folders of this run that are kept for a reason."""
        own = [self.best_path] if self.best_path is not None and self.best_path.parent == self.folder else []
        return list(dict.fromkeys([*chain(*self._periodic.values()), *own]))

    def save_if_due(
        self,
        module: Any,
        view: str,
        progress: Progress,
        recipe: Recipe,
        metrics: Mapping[str, float],
        *,
        may_lack_best: bool = False,
    ) -> None:
        """Call while a view is in the module; saves it where a periodic save is due or it is the best so far.

        Args:
            module: The model.
            view: Its name.
            progress: Counters of the merge point.
            recipe: How it was made.
            metrics: What was measured of it.
            may_lack_best: Whether the metric of `save.best` may be missing, since an evaluation failed that may.

        Raises:
            ConfigError: `save.best` names a metric that was not measured.
            CheckpointError: The disk refuses.
        """
        is_due = self._cadence is not None and self._cadence.crossed(self._last_merge.get(view, self._start), progress)
        score = self._score(metrics, may_lack_best) if view != RAW else None  # raw is beside the merges, not one
        is_best = score is not None and (self._best is None or score < self._best[0])
        if is_due or is_best:
            reasons = [*(["every"] if is_due else []), *(["best"] if is_best else [])]
            path = self._save(module, view, progress, recipe, metrics, reasons)
            if is_due:
                self._periodic.setdefault(view, []).append(path)
            # it goes when the new one is on the disk and named
            old = self._best if is_best else None
            if is_best and score is not None:
                self._best = (score, path)
                self._name_best()
            self._drop_surplus(view, old[1] if old is not None else None)
        # also where nothing was saved: the next multiple counts from here
        self._last_merge[view] = progress

    def save_last(self, module: Any, view: str, progress: Progress, recipe: Recipe) -> Path:
        """Save the view that is in the module now, for good."""
        return self._save(module, view, progress, recipe, {}, ["at_end"])

    def path_of(self, view: str, progress: Progress) -> Path:
        """Where a view of this step is, if it was saved."""
        return self.folder / f"step-{progress.step:08d}-{view}"

    def _score(self, metrics: Mapping[str, float], may_lack_best: bool) -> float | None:
        """The metric of `save.best`, lower is better; None where there is none that can be the best."""
        best = self._config.best
        if best is None:
            return None
        find = partial(metric_names.measured_name, "save.best") if not may_lack_best else metric_names.found
        value = metrics.get(find(best, metrics) or best, math.nan)
        # NaN is never the best
        return (-value if self._config.mode == "max" else value) if math.isfinite(value) else None

    def _name_best(self) -> None:
        """Tell whoever looks into the folder which of the models is the best; rank 0."""
        if ranks.rank() != 0 or self._config.best is None:
            return
        target = self.folder / BEST
        try:
            about = self._provenance_of_best()
            if self._best is None or about is None:
                target.unlink(missing_ok=True)
                return
            path = self._best[1]
            metrics = about.get("metrics")
            # anybody may have edited that file
            metrics = metrics if isinstance(metrics, Mapping) else {}
            value = metrics.get(metric_names.found(self._config.best, metrics))
            what = {
                "folder": path.name if path.parent == self.folder else str(path),
                "view": about.get("view"),
                "step": about.get("step"),
                "metric": self._config.best,
                "mode": self._config.mode,
                "value": value,
            }
            atomic.make_folder(self.folder)
            atomic.write(target, json.dumps(what, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot write {target}: {error}. Free space there.") from error

    def _provenance_of_best(self) -> Mapping[str, Any] | None:
        if self._best is not None:
            with suppress(CheckpointError):  # a checkpoint may name anything
                return read_provenance(self._best[1])
        return None

    def _drop_surplus(self, view: str, old_best: Path | None) -> None:
        saved = self._periodic.get(view, [])
        self._surplus += [saved.pop(0) for _ in range(len(saved) - self._config.keep)]
        self._surplus += [old_best] if old_best is not None else []
        self.drop_unused()

    def drop_unused(self) -> None:
        """Delete surplus models that nobody uses any more, unless they are wanted for another reason."""
        wanted = {self.best_path, *chain(*self._periodic.values())}
        surplus = [path for path in dict.fromkeys(self._surplus) if path not in wanted]
        self._surplus = [path for path in surplus if self.users.is_using(path)]
        for path in surplus:
            is_ours = path.parent == self.folder and _NAME.fullmatch(path.name) is not None
            if path not in self._surplus and is_ours and ranks.rank() == 0:
                discard(path)

    def _save(
        self,
        module: Any,
        view: str,
        progress: Progress,
        recipe: Recipe,
        metrics: Mapping[str, float],
        reasons: Sequence[str],
    ) -> Path:
        target = self.path_of(view, progress)
        provenance = {
            "view": view,
            **asdict(progress),
            "steps": list(recipe.steps),
            "coefficients": list(recipe.coefficients),
            "config": dict(self._settings),
            "metrics": dict(metrics),
            "saved_for": list(reasons),
        }
        # as rank 0 sees it: a shared file system may show others a folder late
        if ranks.gather(os.path.lexists(target))[0]:
            if holds_weights_of(module, target):
                with ranks.all_or_none(f"note why {target} is kept"):
                    if ranks.rank() == 0:
                        add_reasons(target, reasons)
                self.users.published(target, view, progress.step)
                return target
            with ranks.all_or_none(f"move {target} aside"):
                if ranks.rank() == 0:
                    move_aside(target)  # of a run that went on from an earlier checkpoint another way
        save_merged(module, target, provenance)
        self.users.published(target, view, progress.step)
        return target
