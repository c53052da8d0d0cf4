"""Which merged models are written to disk, and which old ones go.

This module knows `save: {every, keep, best, mode, at_end}` and the names of folders. It writes what is in the module
when it is called; putting merged weights there and taking them out is the caller's.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain_merge.cadence import Progress
from pretrain_merge.checkpoints.folders import move_aside
from pretrain_merge.checkpoints.merged import holds_weights_of, save_merged
from pretrain_merge.config import SaveConfig, save_cadence
from pretrain_merge.errors import ConfigError
from pretrain_merge.records import Recipe


def refuse_unmeasured(best: str | None, metrics: Mapping[str, float]) -> None:
    """Raise a `ConfigError` where `save.best` names a metric that is not among the measured ones."""
    if best is not None and best not in metrics:
        raise ConfigError(f"save.best: {best!r} was not measured. Measured: {', '.join(metrics) or 'nothing'}.")


class MergedModels:
    """The folder `merged/` of one run.

    Args:
        folder: Where `step-…-<view>` folders go.
        config: What to save.
        settings: The whole configuration as plain values, for provenance.
        start: Counters at which the run starts or goes on.
    """

    def __init__(
        self, folder: Path, config: SaveConfig, settings: Mapping[str, Any], start: Progress | None = None
    ) -> None:
        self.folder = folder
        self._config = config
        self._settings = settings
        self._cadence = save_cadence(config)
        self._start = start or Progress()
        self._last_merge: dict[str, Progress] = {}
        self._periodic: dict[str, list[Path]] = {}
        self._best: tuple[float, Path] | None = None

    @property
    def best_path(self) -> Path | None:
        """The best merged model so far, by `save.best`."""
        return self._best[1] if self._best else None

    def state_dict(self) -> dict[str, Any]:
        """What is on disk for which reason, as plain values."""
        periodic = {view: [str(path) for path in saved] for view, saved in self._periodic.items()}
        best = [self._best[0], str(self._best[1])] if self._best else None
        last = {view: asdict(progress) for view, progress in self._last_merge.items()}
        return {"periodic": periodic, "best": best, "last_merge": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what an earlier part of the run saved, as far as it is still there."""
        found = {view: [Path(path) for path in saved] for view, saved in state.get("periodic", {}).items()}
        self._periodic = {view: [path for path in saved if path.exists()] for view, saved in found.items()}
        if state.get("best") and Path(state["best"][1]).exists():
            self._best = (float(state["best"][0]), Path(state["best"][1]))
        self._last_merge = {view: Progress(**counts) for view, counts in state.get("last_merge", {}).items()}

    def keep(self, module: Any, view: str, progress: Progress, recipe: Recipe, metrics: Mapping[str, float]) -> None:
        """Call while a view is in the module; saves it where a periodic save is due or it is the best so far.

        Raises:
            ConfigError: `save.best` names a metric that was not measured.
            CheckpointError: The disk refuses.
        """
        if self._cadence is not None and self._cadence.crossed(self._last_merge.get(view, self._start), progress):
            self._keep_periodic(view, self._save(module, view, progress, recipe, metrics))
        if self._config.best is not None:
            self._keep_best(self._config.best, module, view, progress, recipe, metrics)
        self._last_merge[view] = progress

    def keep_last(self, module: Any, view: str, progress: Progress, recipe: Recipe) -> Path:
        """Save the view that is in the module now, for good."""
        return self._save(module, view, progress, recipe, {})

    def _keep_periodic(self, view: str, path: Path) -> None:
        saved = self._periodic.setdefault(view, [])
        saved.append(path)
        while len(saved) > self._config.keep:
            self._drop(saved.pop(0))

    def _keep_best(
        self, best: str, module: Any, view: str, progress: Progress, recipe: Recipe, metrics: Mapping[str, float]
    ) -> None:
        refuse_unmeasured(best, metrics)
        value = metrics[best]
        score = -value if self._config.mode == "max" else value
        if math.isfinite(score) and (self._best is None or score < self._best[0]):
            old, self._best = self._best, (score, self._save(module, view, progress, recipe, metrics))
            if old is not None:
                self._drop(old[1])

    def _drop(self, path: Path) -> None:
        """Delete a saved model unless it is still wanted for another reason."""
        if path != self.best_path and not any(path in saved for saved in self._periodic.values()):
            shutil.rmtree(path, ignore_errors=True)

    def _save(self, module: Any, view: str, progress: Progress, recipe: Recipe, metrics: Mapping[str, float]) -> Path:
        target = self.folder / f"step-{progress.step:08d}-{view}"
        provenance = {
            "view": view,
            **asdict(progress),
            "steps": list(recipe.steps),
            "coefficients": list(recipe.coefficients),
            "config": dict(self._settings),
            "metrics": dict(metrics),
        }
        if target.exists():
            if holds_weights_of(module, target):
                return target
            move_aside(target)  # of a run that went on from an earlier checkpoint another way
        save_merged(module, target, provenance)
        return target
