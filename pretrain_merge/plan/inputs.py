"""What a plan is asked about: how the callback is configured, and the run that it is part of.

This module knows the values and which of them make no sense. It computes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain_merge.cadence import Quantity
from pretrain_merge.errors import ConfigError
from pretrain_merge.plan.hardware import Hardware
from pretrain_merge.plan.shards import Layout, Model

# spelled here too: a plan is made without torch, which `stores` imports
STORES = ("auto", "device", "host", "disk")


@dataclass(frozen=True)
class Merging:
    """The keys of the callback's configuration that cost something.

    Attributes:
        every: Distance between snapshots (V), in steps or tokens.
        merge_every: Distance between merges; None: every snapshot.
        window: Snapshots kept (N).
        views: How many snapshots each view merges.
        average: "last" or "block".
        sample_every: With "block": steps between the models that enter the mean.
        store: Where slots lie; "auto": where the stores would put them.
        itemsize: Bytes per element of the live parameters.
        slot_itemsize: Bytes per element of a slot; never more than `itemsize`.

    Raises:
        ConfigError: An impossible value.
    """

    every: Quantity
    merge_every: Quantity | None = None
    window: int = 10
    views: tuple[int, ...] = (10,)
    average: str = "last"
    sample_every: int = 1
    store: str = "auto"
    itemsize: int = 4
    slot_itemsize: int = 4

    def __post_init__(self) -> None:
        _require(self, "store", lambda value: value in STORES, " or ".join(STORES))
        # a wider slot would hold no more than the parameter does
        _require(self, "slot_itemsize", lambda value: 1 <= value <= self.itemsize, "no more than the parameters'")
        _require(self, "views", lambda value: len(value) > 0, "at least one view")
        for key in ("every", "merge_every"):
            quantity = getattr(self, key)
            # how many tokens a sample has, only the user's data know
            if quantity is not None and quantity.unit == "samples":
                raise ConfigError(f"{key}: {quantity}. A plan counts in steps or tokens; give the tokens of as many.")

    @property
    def in_blocks(self) -> bool:
        """Whether a snapshot is the mean of the models in its interval."""
        return self.average == "block"

    @property
    def span_in_intervals(self) -> int:
        """How many intervals a full window reaches over: N means do, and N snapshots one fewer."""
        return self.window if self.in_blocks else self.window - 1

    @property
    def has_scratch(self) -> bool:
        """Whether raw is copied aside during an evaluation, since the newest slot does not hold it bit for bit."""
        return self.in_blocks or self.slot_itemsize < self.itemsize

    @property
    def accumulator_itemsize(self) -> int:
        """Bytes per element of the open sum: float32, or float64 for float64."""
        return max(4, self.itemsize)  # P20: a sum in bf16 stands still


@dataclass(frozen=True)
class Training:
    """The run.

    Attributes:
        tokens_per_step: Tokens of one optimizer step, over all ranks.
        tokens_per_evaluation: Tokens of one pass over the validation data, over all ranks.
        step_seconds: Seconds of one optimizer step; None: estimated.
        utilisation: Share of the peak operations per second that training reaches, for the estimate.
        total_tokens: Of the whole run; None: not known.

    Raises:
        ConfigError: An impossible value.
    """

    tokens_per_step: int
    tokens_per_evaluation: int
    step_seconds: float | None = None
    utilisation: float = 0.4
    total_tokens: int | None = None

    def __post_init__(self) -> None:
        _require(self, "total_tokens", lambda value: value is None or value >= 1, "1 or more")
        _require(self, "tokens_per_step", lambda value: value >= 1, "1 or more")
        _require(self, "tokens_per_evaluation", lambda value: value >= 0, "0 or more")
        _require(self, "step_seconds", lambda value: value is None or value > 0, "more than 0, or none to estimate it")
        _require(self, "utilisation", lambda value: 0 < value <= 1, "more than 0, up to 1")


@dataclass(frozen=True)
class Question:
    """All that a plan is made from."""

    model: Model
    layout: Layout
    hardware: Hardware
    merging: Merging
    training: Training


def _require(values: object, key: str, holds: Callable[..., bool], allowed: str) -> None:
    value = getattr(values, key)
    # asked for what holds, so that NaN is refused
    if not holds(value):
        raise ConfigError(f"{key}: {value!r} is out of range. Allowed: {allowed}.")
