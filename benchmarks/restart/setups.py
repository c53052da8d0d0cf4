"""What is trained, and from where a restart may begin. Numbers and names only."""

import math
from dataclasses import asdict, dataclass, replace

SEEDS = tuple(range(8))
BLOCK_LENGTH = 64
VALIDATION_BLOCKS = 160
WINDOW = 10  # snapshots in a merge
AFTER = 500  # steps that a restart is followed for
REWARM = 30  # steps of a second warm-up
DEEPER = 100  # at least so many steps before the newest snapshot
TAIL = 100  # a run at constant rate is judged by the mean of its last iterates, too, which has less noise


@dataclass(frozen=True)
class Setup:
    """One trunk.

    Attributes:
        seed: Draws weights and data.
        num_steps: At most; a run that diverges ends there.
        every: Steps between snapshots.
        lr: After the warm-up, constant.
        beta2: Of AdamW.
        clip: Largest norm of the gradient; infinite where nothing is clipped.
        text: A name in `texts.TEXTS`.
        width: Size of the hidden states.
        depth: Layers.
        batch_size: Blocks of 64 bytes per step.
        warmup_steps: Linear.
    """

    seed: int
    num_steps: int = 1500
    every: int = 15
    lr: float = 3.5e-3
    beta2: float = 0.95
    clip: float = 1.0
    text: str = "stdlib"
    width: int = 48
    depth: int = 2
    batch_size: int = 4
    warmup_steps: int = 30

    def describe(self) -> dict[str, object]:
        """All numbers, for the record."""
        return asdict(self)


def trunk_of(question: str, seed: int, *, quick: bool = False) -> Setup:
    """What a question starts from: its own way to collapse, or the one run that nothing happens to.

    Ten snapshots of the stable run span 9% of it.
    """
    trunk = {
        "divergence": Setup(seed, every=10, lr=0.3, beta2=0.999, clip=math.inf),
        "creeping": Setup(seed, every=10, lr=0.3, clip=math.inf),
    }.get(question, Setup(seed))
    return replace(trunk, num_steps=60, every=2) if quick else trunk
