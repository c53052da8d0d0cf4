"""What the demo trains, and which stretch of it is annealed: numbers only.

This module knows how an experiment and a merging configuration fit together. It knows no model, no text and no trainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain_merge.cadence import Quantity
from pretrain_merge.config import MergeConfig
from pretrain_merge.errors import ConfigError

FAMILIES: Mapping[str, str] = {"llama": "Llama", "moe": "Mixtral-style mixture of experts"}


@dataclass(frozen=True)
class Experiment:
    """What is trained, on how much.

    Attributes:
        family: "llama" or "moe".
        num_steps: Length of the run.
        batch_size: Blocks per step.
        block_length: Bytes per block.
        peak_lr: Learning rate after the warm-up; high, as in pre-training: merging removes the noise that it leaves.
        warmup_steps: Steps of linear warm-up.
        num_validation_blocks: Held-out blocks that every evaluation reads.
        seed: Draws weights and data.
    """

    family: str = "llama"
    num_steps: int = 2400
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
        validate_every: Steps between validations; divides both.
    """

    start: int
    num_steps: int
    validate_every: int


def last_window(experiment: Experiment, config: MergeConfig) -> Branch:
    """The stretch that the last window spans: (N-1)V steps between N snapshots, NV under N blocks."""
    every = Quantity.parse(config.every, key="every")
    merge_every = Quantity.parse(config.merge_every or config.every, key="merge_every")
    num_steps = every.amount * (config.window - (config.average == "last"))
    start = experiment.num_steps - num_steps
    fits = experiment.num_steps % merge_every.amount == 0 and start >= experiment.warmup_steps
    if {every.unit, merge_every.unit} != {"steps"} or not fits:
        raise ConfigError(
            f"num_steps: {experiment.num_steps} does not fit snapshots every {every} and merges every {merge_every}. "
            f"The demo needs both in steps, and a run that ends at a merge point with a full window ({num_steps} "
            f"steps) after its {experiment.warmup_steps} steps of warm-up: choose a larger multiple of "
            f"{merge_every.amount}."
        )
    return Branch(start, num_steps, validate_every=every.amount)
