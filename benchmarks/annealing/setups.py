"""What the suite trains: runs that differ in what users' runs differ in. Numbers and names only.

A run has 120 intervals, so that all runs have merges and anneals at the same shares of their training. The order is
mixed: a suite that was interrupted is already diverse.
"""

from dataclasses import asdict, dataclass, field, fields

from pretrain_merge.demo.experiment import Experiment

INTERVALS = 120  # per run
MERGE_EVERY = 6  # intervals
_ENDS = {36: (3, 6, 9), 60: (3, 6, 12, 18), 84: (3, 9, 18, 24), 120: (3, 6, 12, 24, 36)}
_OTHER_SHAPES = {60: (12,), 84: (18,), 120: (12, 36)}
_REPEATED = (120, 12)  # the branch that is trained with other data orders, too


@dataclass(frozen=True)
class Anneal:
    """A branch: leaves the run at `start`, ends after `steps`; `order` 0 sees the run's own batches."""

    start: int
    steps: int
    shape: str = "linear"
    order: int = 0


@dataclass(frozen=True)
class Setup(Experiment):
    """One run of the suite.

    Attributes:
        name: Name of its file.
        text: A name in `texts.TEXTS`.
        width: Size of the hidden states.
        depth: Number of layers.
        optimizer: "adamw", "muon" (matrices between embedding and head; AdamW for the rest) or "sgd" (momentum 0.9).
        weight_decay: Decoupled for AdamW and Muon, coupled for SGD.
        num_orders: Data orders in which the repeated branch is trained besides the run's own.
    """

    name: str = field(kw_only=True)
    text: str = "stdlib"
    width: int = 64
    depth: int = 2
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    num_orders: int = 0
    num_steps: int = 1440
    batch_size: int = 8
    peak_lr: float = 3e-3
    num_validation_blocks: int = 512

    @property
    def every(self) -> int:
        """Steps of one interval."""
        return self.num_steps // INTERVALS

    @property
    def anneals(self) -> list[Anneal]:
        """Every branch of this run."""
        every = self.every
        stretches = [(end, steps, "linear") for end, lengths in _ENDS.items() for steps in lengths]
        for shape in ("cosine", "1-sqrt"):
            stretches += [(end, steps, shape) for end, lengths in _OTHER_SHAPES.items() for steps in lengths]
        own = [Anneal((end - steps) * every, steps * every, shape) for end, steps, shape in stretches]
        end, steps = _REPEATED
        orders = range(1, self.num_orders + 1)
        return own + [Anneal((end - steps) * every, steps * every, order=order) for order in orders]

    def describe(self) -> dict[str, object]:
        """All numbers, for the record."""
        return {item.name: asdict(self)[item.name] for item in fields(self)}


def _suite() -> tuple[Setup, ...]:
    runs = [
        {"name": "stdlib-base", "num_orders": 8},
        {"name": "headers-lr-high", "text": "headers", "peak_lr": 9e-3},
        {"name": "markov-base", "text": "markov"},
        {"name": "manuals-muon", "text": "manuals", "optimizer": "muon", "peak_lr": 1e-2},
        {"name": "stdlib-moe", "family": "moe", "num_steps": 1200},
        {"name": "headers-sgd", "text": "headers", "optimizer": "sgd", "peak_lr": 0.1, "weight_decay": 0.0},
        {"name": "manuals-wide", "text": "manuals", "width": 128, "peak_lr": 2e-3, "num_steps": 720},
        {"name": "stdlib-lr-low-batch-large", "peak_lr": 1e-3, "batch_size": 32, "num_steps": 600},
        {"name": "markov-lr-high-no-decay", "text": "markov", "peak_lr": 9e-3, "weight_decay": 0.0},
        {"name": "stdlib-deep", "depth": 6, "num_steps": 600, "num_validation_blocks": 256},
        {"name": "headers-moe-muon", "text": "headers", "family": "moe", "optimizer": "muon", "num_steps": 960},
        {"name": "manuals-lr-low", "text": "manuals", "peak_lr": 1e-3},
        {"name": "stdlib-sgd", "optimizer": "sgd", "peak_lr": 0.1, "weight_decay": 1e-4},
        {"name": "headers-batch-large", "text": "headers", "batch_size": 32, "num_steps": 720, "num_orders": 8},
        {"name": "stdlib-batch-small", "batch_size": 4, "num_steps": 2400, "num_orders": 8},
        {"name": "manuals-moe", "text": "manuals", "family": "moe", "peak_lr": 6e-3, "num_steps": 960},
        {"name": "stdlib-muon-lr-high", "optimizer": "muon", "peak_lr": 3e-2},
        {"name": "markov-muon", "text": "markov", "optimizer": "muon", "peak_lr": 1e-2},
        {"name": "headers-large", "text": "headers", "width": 192, "depth": 3, "peak_lr": 1.5e-3, "num_steps": 360}
        | {"warmup_steps": 40, "num_validation_blocks": 256},
        {"name": "stdlib-lr-high-no-decay", "peak_lr": 9e-3, "weight_decay": 0.0},
        {"name": "headers-no-decay", "text": "headers", "weight_decay": 0.0, "batch_size": 16, "num_steps": 960},
        {"name": "manuals-sgd", "text": "manuals", "optimizer": "sgd", "peak_lr": 0.03, "weight_decay": 0.0},
        {"name": "markov-deep-batch-small", "text": "markov", "depth": 5, "batch_size": 4, "num_steps": 1200},
        {"name": "stdlib-largest", "width": 256, "depth": 3, "peak_lr": 1e-3, "num_steps": 240, "warmup_steps": 30}
        | {"num_validation_blocks": 192},
    ]
    return tuple(Setup(seed=seed, **run) for seed, run in enumerate(runs))


def _fresh() -> tuple[Setup, ...]:
    runs = [
        {"name": "perl-wide-deep", "text": "perl", "width": 96, "depth": 3, "num_steps": 1200},
        {"name": "perl-muon", "text": "perl", "optimizer": "muon", "peak_lr": 2e-2},
        {"name": "stdlib-long", "peak_lr": 2e-3, "num_steps": 2880},
        {"name": "perl-moe-sgd", "text": "perl", "family": "moe", "optimizer": "sgd", "peak_lr": 0.1, "num_steps": 960}
        | {"weight_decay": 0.0},
        {"name": "manuals-lr-high-batch-small", "text": "manuals", "peak_lr": 9e-3, "batch_size": 4, "num_steps": 1800},
        {"name": "headers-deep-lr-low", "text": "headers", "depth": 4, "peak_lr": 1e-3, "batch_size": 16}
        | {"num_steps": 720},
    ]
    return tuple(Setup(seed=seed, **run) for seed, run in enumerate(runs, start=100))


SUITE = _suite()
FRESH = _fresh()  # trained after the law of the forecasts was chosen, and read by nothing that chooses or fits
