"""The keys of `SpikeRecovery`, checked, and its restart points as a checkpoint holds them.

This module knows values and tensors. It knows no hooks and no steps of a run.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pretrain_merge.config.reading import did_you_mean
from pretrain_merge.errors import CheckpointError, ConfigError
from pretrain_merge.parameters import is_sharded
from pretrain_merge.runtime import ranks
from pretrain_merge.spikes.restart_points import RestartPoint

_CHOICES = {"optimizer": ("fresh", "newest"), "weights": ("raw", "merge"), "store": ("host", "disk")}
_LEAST = {"distrust": 1, "rewarm": 0, "attempts": 1, "confirm": 0, "every": 1, "keep": 1}
_KEPT_FOR_MERGE = 4  # restart points; with the default interval they span 150 steps


@dataclass(frozen=True)
class RecoverySettings:
    """The keys of the callback, where each is explained.

    Raises:
        ConfigError: One is unknown or impossible.
    """

    distrust: int = 100
    lr: float = 0.5
    clip: float | None = 1.0
    optimizer: str = "fresh"
    rewarm: int = 30
    weights: str = "raw"
    attempts: int = 3
    confirm: int = 20
    every: int = 50
    keep: int | None = None
    store: str = "host"
    store_folder: str | None = None
    in_checkpoints: bool = True

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(allowed)}.")
        for key, least in _LEAST.items():
            value = self.num_kept if key == "keep" else getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}: {value!r} is not allowed. Allowed: whole numbers from {least} on.")
        if not (_is_number(self.lr) and 0.0 < self.lr <= 1.0):
            raise ConfigError(f"lr: {self.lr!r} is not a factor of the learning rate. Allowed: above 0, up to 1.")
        if self.clip is not None and not (_is_number(self.clip) and self.clip > 0.0):
            raise ConfigError(f"clip: {self.clip!r} is not a norm. Allowed: numbers above 0, or None for no clipping.")
        if self.store_folder is not None and self.store != "disk":
            raise ConfigError(
                f"store_folder: {self.store_folder!r} is for store: disk, not for {self.store}. Leave it out."
            )
        if self.weights == "merge" and self.num_kept < 2:
            raise ConfigError("keep: 1, and weights: merge is a mean of restart points. Allowed: keep from 2 on.")
        # measured: at the same rate six of six runs diverged again within 150 steps
        if (self.lr, self.clip, self.weights) == (1.0, None, "raw"):
            raise ConfigError(
                "lr: 1, and clip: None would go back and change nothing that lasts, which only delays the next "
                "divergence. Lower lr, or clip."
            )

    @property
    def num_kept(self) -> int:
        """How many restart points are kept of those that are old enough."""
        return self.keep if self.keep is not None else _KEPT_FOR_MERGE if self.weights == "merge" else 1

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "RecoverySettings":
        """From keys, of which one may be misspelt."""
        known = [item.name for item in fields(cls)]
        for key in given:
            if key not in known:
                meant = did_you_mean(key, known)
                raise ConfigError(f"{key}: not a key of SpikeRecovery{meant} Allowed: {', '.join(known)}.")
        return cls(**given)

    def folder_of_rank(self, run_folder: Path) -> Path | None:
        """Where restart points of this rank lie; None: in memory."""
        if self.store == "host":
            return None
        # a folder of its own: all ranks have points of the same steps
        return Path(self.store_folder or run_folder / "restart_points") / f"rank-{ranks.rank()}"


def packed(points: Iterable[RestartPoint], module: nn.Module, *, alone: bool) -> list[dict[str, Any]] | None:
    """Restart points as values of a checkpoint; None where they cannot be told.

    A checkpoint has the state of callbacks from rank 0 only (P10). Replicas are alike; of shards it needs all.

    Args:
        points: Of this rank.
        module: Whose tensors they hold.
        alone: Other ranks may not be here.
    """
    if alone:  # the losses that ranks have not added up yet are lost, too
        return None
    sharded = is_sharded(module)
    # `ranks`: of replicas one for all, or the checkpoint would grow with their number
    return [
        {
            "step": point.step,
            "is_used": point.is_used,
            "watch": dict(point.watch),
            "ranks": ranks.gather(dict(point.read())) if sharded else [dict(point.read())],
        }
        for point in points
    ]


def unpacked(
    points: Iterable[Mapping[str, Any]] | None,
) -> Iterator[tuple[int, Mapping[str, Tensor], Mapping[str, Any], bool]]:
    """Step, tensors of this rank, what was known of the loss, and whether it was used, of each point.

    Raises:
        CheckpointError: They are not there, or of another number of ranks.
    """
    remedy = "or leave the restart points out by SpikeRecovery(in_checkpoints=False): the first is then the checkpoint."
    if points is None:
        raise CheckpointError(
            f"the checkpoint was saved after an exception, in which no rank could ask the others. Resume from "
            f"another checkpoint, {remedy}"
        )
    for point in points:
        of_ranks = point["ranks"]  # one of replicas, all of shards
        if len(of_ranks) not in (1, ranks.num_ranks()):
            raise CheckpointError(
                f"the checkpoint has restart points in {len(of_ranks)} shards, and this run has {ranks.num_ranks()} "
                f"ranks. Resume with as many as before, {remedy}"
            )
        yield point["step"], of_ranks[ranks.rank() if len(of_ranks) > 1 else 0], point["watch"], point["is_used"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
