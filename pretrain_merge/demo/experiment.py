"""What the demo trains, and which stretch of it is annealed: numbers only.

This module knows how an experiment and a merging configuration fit together. It knows no model, no text and no trainer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from pretrain_merge.cadence import Cadence, Progress
from pretrain_merge.config import MergeConfig
from pretrain_merge.config.build import merge_cadence, snapshot_cadence
from pretrain_merge.errors import ConfigError

FAMILIES: Mapping[str, str] = {"llama": "Llama", "moe": "Mixtral-style mixture of experts"}
_POINTS = 10  # of the branch's curve, at least


@dataclass(frozen=True)
class Experiment:
    """What is trained, on how much.

    Attributes:
        family: "llama" or "moe".
        num_steps: Length of the run; a merge point of `merge.yaml`.
        batch_size: Blocks per step.
        block_length: Bytes per block.
        peak_lr: Learning rate after the warm-up; high, as in pre-training: merging removes the noise that it leaves.
        warmup_steps: Steps of linear warm-up.
        num_validation_blocks: Held-out blocks that every evaluation reads.
        seed: Draws weights and data.
    """

    family: str = "llama"
    num_steps: int = 2320
    batch_size: int = 16
    block_length: int = 64
    peak_lr: float = 6e-3
    warmup_steps: int = 100
    num_validation_blocks: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Branch:
    """A stretch of the run that is trained a second time, annealing.

    Attributes:
        start: Step at which it leaves the run.
        num_steps: Steps until the run's own end.
        validate_every: Steps between validations, counted from the run's first step; divides its last.
    """

    start: int
    num_steps: int
    validate_every: int


def last_window(experiment: Experiment, config: MergeConfig) -> Branch:
    """The stretch that the last window spans: from its oldest snapshot to the run's end, or NV under N blocks."""
    since = Progress(experiment.warmup_steps)  # the rate changes up to here, and each change is a break
    cadence = snapshot_cadence(config)
    merging = merge_cadence(config) or cadence
    snapshots = _due(cadence, range(1, experiment.num_steps + 1), since)
    merges = _due(merging, snapshots, since)
    # a block mean reaches one interval further back than the snapshot that ends it
    back = config.window + (config.average == "block")
    reached = [step for step in snapshots if step >= since.step][-back:]
    if merges[-1:] != [experiment.num_steps] or len(reached) < back:
        raise ConfigError(
            f"num_steps: {experiment.num_steps} does not fit snapshots every {cadence.every} and merges every "
            f"{merging.every}. The demo needs both in steps, and a run that ends at a merge point with a full window "
            f"after its {experiment.warmup_steps} steps of warm-up. Merge points so far: {merges[-3:]}."
        )
    num_steps = experiment.num_steps - reached[0]
    # validations are counted from the run's first step, so only a divisor of its last ends on it
    at_most = max(1, num_steps // _POINTS)
    validate_every = next(step for step in range(at_most, 0, -1) if experiment.num_steps % step == 0)
    return Branch(reached[0], num_steps, validate_every)


def _due(cadence: Cadence, steps: Iterable[int], since: Progress) -> list[int]:
    """The steps at which something is due, of those at which it may be."""
    return [
        now for before, now in pairwise([0, *steps]) if cadence.crossed(Progress(before), Progress(now), since=since)
    ]
