"""Which merged models are written to disk, and which old ones go.

This module knows `save: {every, keep, best, mode, at_end}` and the names of folders. It writes what is in the module
when it is called; putting merged weights there and taking them out is the caller's. On several ranks every rank keeps
the same books, and rank 0 deletes and renames.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig, save_cadence
from pretrain_merge.files.folders import discard, move_aside
from pretrain_merge.merged_models.best import NAME, BestModel, step_of
from pretrain_merge.merged_models.folder_users import FolderUsers, NobodyUses
from pretrain_merge.merged_models.merged import holds_weights_of, save_merged
from pretrain_merge.merged_models.provenance import add_reasons, set_withdrawn
from pretrain_merge.records import RAW, Recipe
from pretrain_merge.runtime import ranks
from pretrain_merge.runtime.log import logger


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
        stand_ins: Likewise with their metrics, those that would be the best if a spike took that back.
        withdrawn: By the names of their folders, why models were taken back.
    """

    start: Progress = field(default_factory=Progress)
    last_merge: Mapping[str, Progress] = field(default_factory=dict)
    periodic: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    best: str | None = None
    best_score: float | None = None
    surplus: tuple[str, ...] = ()
    stand_ins: Mapping[str, float] = field(default_factory=dict)
    withdrawn: Mapping[str, str] = field(default_factory=dict)


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
        withdrawn: By the names of their folders, why models were taken back: by the last spike that took any, and
            earlier ones that `save.every` keeps.
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
        self._best = BestModel(self.folder, config)
        self.withdrawn: Mapping[str, str] = {}
        self._surplus: list[Path] = []  # to be deleted once nobody uses them
        self.users: FolderUsers = NobodyUses()

    @property
    def best_path(self) -> Path | None:
        """The best merged model so far, by `save.best`."""
        return self._best.path

    def state(self) -> SavedModels:
        """What is on disk for which reason."""
        periodic = {view: tuple(path.name for path in saved) for view, saved in self._periodic.items()}
        start, last = self._start, dict(self._last_merge)
        surplus = tuple(path.name for path in self._surplus)
        scores = self._best.scores()
        best, best_score = scores.popitem() if scores else (None, None)
        return SavedModels(start, last, periodic, best, best_score, surplus, scores, dict(self.withdrawn))

    def resume_from(self, saved: SavedModels, before: Path) -> None:
        """Go on with what an earlier part of the run saved, as far as it is still there.

        Args:
            saved: What `state` gave.
            before: The folder `merged/` then. Where that is another one, its models stay as they are.
        """
        self._start, self._last_merge = saved.start, dict(saved.last_merge)
        found = {view: [self.folder / name for name in names] for view, names in saved.periodic.items()}
        scores = dict(saved.stand_ins)
        if saved.best is not None and saved.best_score is not None:
            scores[saved.best] = saved.best_score
        # here first: of a folder that was copied, the copy belongs to this run
        places = {name: [folder / name for folder in (self.folder, before.absolute())] for name in scores}
        known = {*chain(*found.values(), *places.values())}
        there = ranks.gather({path for path in known if path.exists()})[0]  # all decide alike
        self._periodic = {view: [path for path in paths if path in there] for view, paths in found.items()}
        first = {name: next((path for path in paths if path in there), None) for name, paths in places.items()}
        self._best.resume_from({path: scores[name] for name, path in first.items() if path is not None})
        self.withdrawn = dict(saved.withdrawn)
        self._surplus = [self.folder / name for name in saved.surplus]
        with ranks.all_or_none("name the best merged model"):
            # a spike after the checkpoint that the run goes on from has not been yet
            self._note_withdrawn([path for path in self.kept if path.name not in self.withdrawn], "")
            self._best.note(self.withdrawn)

    @property
    def kept(self) -> list[Path]:
        """Folders of this run that are kept for a reason."""
        own = [path for path in self._best.paths if path.parent == self.folder]
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
        trusted_until: int | None = None,
    ) -> None:
        """Call while a view is in the module; saves it where a periodic save is due or it is the best so far.

        Args:
            module: The model.
            view: Its name.
            progress: Counters of the merge point.
            recipe: How it was made.
            metrics: What was measured of it.
            may_lack_best: Whether the metric of `save.best` may be missing, since an evaluation failed that may.
            trusted_until: Last step that `withdraw` cannot reach any more; None: it is never called.

        Raises:
            ConfigError: `save.best` names a metric that was not measured.
            CheckpointError: The disk refuses.
        """
        is_due = self._cadence is not None and self._cadence.crossed(self._last_merge.get(view, self._start), progress)
        # raw is beside the merges, not one
        score = self._best.score_of(metrics, may_lack=may_lack_best) if view != RAW else None
        is_best = score is not None and self._best.is_beaten_by(score)
        if is_due or is_best:
            reasons = [*(["every"] if is_due else []), *(["best"] if is_best else [])]
            path = self._save(module, view, progress, recipe, metrics, reasons)
            if is_due:
                self._periodic.setdefault(view, []).append(path)
            if is_best and score is not None:
                self._best.enter(path, score)
                self._best.note(self.withdrawn)
            self._drop_surplus(view, trusted_until)
        self._last_merge[view] = progress

    def withdraw(self, after: int, reason: str) -> None:
        """Take back merges of later steps: none of them is the best any more, and each says why. Collective.

        They are deleted only where they would have been without: what `save.every` keeps stays its time.

        Args:
            after: The last step whose snapshots are trusted.
            reason: Why those after it are not.

        Raises:
            CheckpointError: The disk refuses.
        """
        held = dict.fromkeys([*chain(*self._periodic.values()), *self._best.paths])
        # each read tells of a spike again while it lasts
        taken = [path for path in held if step_of(path) > after and path.name not in self.withdrawn]
        if not taken:
            return
        periodic = {path.name for path in chain(*self._periodic.values())}
        earlier = {name: why for name, why in self.withdrawn.items() if name in periodic}
        self.withdrawn = earlier | {path.name: reason for path in taken}
        self._surplus += self._best.withdraw(after)
        with ranks.all_or_none("withdraw merged models"):
            self._note_withdrawn(taken, reason)
            self._best.note(self.withdrawn)
        self.drop_unused()
        if ranks.rank() == 0:
            best = "" if self._config.best is None else f" The best one is now {self.best_path or 'none'}."
            logger.warning(f"{', '.join(path.name for path in taken)}: withdrawn ({reason}).{best}")

    def finish(self) -> None:
        """The run has ended: nothing will take its best model back."""
        self._surplus += self._best.settle(None)
        self.drop_unused()

    def save_last(self, module: Any, view: str, progress: Progress, recipe: Recipe) -> Path:
        """Save the view that is in the module now, for good."""
        return self._save(module, view, progress, recipe, {}, ["at_end"])

    def path_of(self, view: str, progress: Progress) -> Path:
        """Where a view of this step is, if it was saved."""
        return self.folder / f"step-{progress.step:08d}-{view}"

    def _note_withdrawn(self, paths: Sequence[Path], reason: str) -> None:
        for path in paths:
            # what lies in the folder of another run stays as it is
            if ranks.rank() == 0 and self._is_ours(path):
                set_withdrawn(path, reason)

    def _drop_surplus(self, view: str, trusted_until: int | None) -> None:
        saved = self._periodic.get(view, [])
        self._surplus += [saved.pop(0) for _ in range(len(saved) - self._config.keep)]
        self._surplus += self._best.settle(trusted_until)
        self.drop_unused()

    def drop_unused(self) -> None:
        """Delete surplus models that nobody uses any more, unless they are wanted for another reason."""
        wanted = {*self._best.paths, *chain(*self._periodic.values())}
        surplus = [path for path in dict.fromkeys(self._surplus) if path not in wanted]
        self._surplus = [path for path in surplus if self.users.is_using(path)]
        for path in surplus:
            if path not in self._surplus and self._is_ours(path) and ranks.rank() == 0:
                discard(path)

    def _is_ours(self, path: Path) -> bool:
        return path.parent == self.folder and NAME.fullmatch(path.name) is not None

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
                        set_withdrawn(target, "")  # by a spike of another past
                self.users.published(target, view, progress.step)
                return target
            with ranks.all_or_none(f"move {target} aside"):
                if ranks.rank() == 0:
                    move_aside(target)  # of a run that went on from an earlier checkpoint another way
        save_merged(module, target, provenance)
        self.users.published(target, view, progress.step)
        return target
