"""Which merged model of a run is the best, which would be without it, and the note `best.json` that names it.

This module knows scores and folders. It writes no weights and deletes nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pretrain_merge.config import SaveConfig
from pretrain_merge.errors import CheckpointError
from pretrain_merge.files import atomic
from pretrain_merge.merged_models.choosing import BEST
from pretrain_merge.merged_models.provenance import read_provenance
from pretrain_merge.records import metric_names
from pretrain_merge.runtime import ranks

# of a merged model's folder, which may be deleted; whatever else lies there is the user's
NAME = re.compile(r"step-([0-9]{8,20})-[^/]+")

MOST_HELD = 3  # where a spike may take the best one back: it, the last that is trusted, and the next to be


def step_of(path: Path) -> int:
    """The step of a merged model, by the name of its folder; 0 where that is not a name of ours."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


class BestModel:
    """The best merged model so far, by `save.best`.

    The newest one may yet be taken back, should a spike show that its snapshots were damaged. So the last of those
    that are old enough to be trusted is held beside it, and the oldest that is not: the next to be trusted. Without
    that one a run which improves at each merge point would never come to trust any of them.

    Args:
        folder: Of merged models.
        config: By which metric, and which way.
    """

    def __init__(self, folder: Path, config: SaveConfig) -> None:
        self._folder, self._config = folder, config
        # scores, lower is better; each better than those before it, so that the last one is the best
        self._found: dict[Path, float] = {}

    @property
    def path(self) -> Path | None:
        """Of the best one."""
        return next(reversed(self._found), None)

    @property
    def paths(self) -> list[Path]:
        """All that are held, the best last."""
        return list(self._found)

    def scores(self) -> dict[str, float]:
        """By the name of the folder; by its path where that lies in the folder of a run before this one."""
        return {self._named(path): score for path, score in self._found.items()}

    def resume_from(self, found: Mapping[Path, float]) -> None:
        """Go on with what `scores` gave, as far as it is still there."""
        self._found = dict(found)

    def score_of(self, metrics: Mapping[str, float], *, may_lack: bool) -> float | None:
        """The metric of `save.best`, lower is better; None where there is none that can be the best.

        Args:
            metrics: What was measured.
            may_lack: Whether it may be missing, since an evaluation failed that may.

        Raises:
            ConfigError: It was not measured.
        """
        best = self._config.best
        if best is None:
            return None
        find = partial(metric_names.measured_name, "save.best") if not may_lack else metric_names.found
        value = metrics.get(find(best, metrics) or best, math.nan)
        # a NaN would never be beaten
        return (-value if self._config.mode == "max" else value) if math.isfinite(value) else None

    def is_beaten_by(self, score: float) -> bool:
        """Whether a model of this score would be the best."""
        return not self._found or score < next(reversed(self._found.values()))

    def enter(self, path: Path, score: float) -> None:
        """A model that is better than all before it."""
        self._found[path] = score

    def settle(self, trusted_until: int | None) -> list[Path]:
        """Let go of those that nothing can bring back; returns them.

        Args:
            trusted_until: Last step whose snapshots no spike can take back any more; None: none ever can.
        """
        trusted = [path for path in self._found if trusted_until is None or step_of(path) <= trusted_until]
        young = [path for path in self._found if path not in trusted]
        # a bound: a run that improves at every merge point would else keep all of the last hundred steps
        return self._keep({*trusted[-1:], *young[:1], *young[-1:]})

    def withdraw(self, after: int) -> list[Path]:
        """Let go of those of later steps; returns them."""
        return self._keep({path for path in self._found if step_of(path) <= after})

    def note(self, withdrawn: Mapping[str, str]) -> None:
        """Tell whoever looks into the folder which of the models is the best; rank 0.

        Args:
            withdrawn: By the name of its folder, why a model was taken back.

        Raises:
            CheckpointError: The disk refuses.
        """
        if ranks.rank() != 0 or self._config.best is None:
            return
        target = self._folder / BEST
        what = self._about_best() | ({"withdrawn": dict(withdrawn)} if withdrawn else {})
        try:
            if not what:
                target.unlink(missing_ok=True)
                return
            atomic.make_folder(self._folder)
            atomic.write(target, json.dumps(what, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot write {target}: {error}. Free space there.") from error

    def _keep(self, wanted: set[Path]) -> list[Path]:
        gone = [path for path in self._found if path not in wanted]
        for path in gone:
            del self._found[path]
        return gone

    def _about_best(self) -> dict[str, Any]:
        about: Mapping[str, Any] = {}
        if self.path is not None:
            with suppress(CheckpointError):  # a checkpoint may name anything
                about = read_provenance(self.path)
        if self.path is None or not about:
            return {}
        metrics = about.get("metrics")
        metrics = metrics if isinstance(metrics, Mapping) else {}
        assert self._config.best is not None
        return {
            "folder": self._named(self.path),
            "view": about.get("view"),
            "step": about.get("step"),
            "metric": self._config.best,
            "mode": self._config.mode,
            "value": metrics.get(metric_names.found(self._config.best, metrics)),
        }

    def _named(self, path: Path) -> str:
        return path.name if path.parent == self._folder else str(path)
