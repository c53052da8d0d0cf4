"""When something is due: every so many steps, samples or tokens, fired on crossing a multiple.

This module knows counters and nothing else: no tensors, no trainer, no window. A cadence keeps no state. Whether it
fires is a function of the counters before and after, so a counter may jump over a multiple (several optimizers in one
batch, tokens counted in bulk, a resumed run) and the cadence still fires exactly once.
"""

import re
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, get_args

from pretrain_merge.errors import ConfigError, ProgressError

Unit = Literal["steps", "samples", "tokens"]
UNITS: tuple[Unit, ...] = get_args(Unit)

_LARGEST = 10**18
_MULTIPLIERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# ASCII: ignoring case, Unicode counts the Kelvin sign as a K and the long s as an s
_QUANTITY = re.compile(
    r"(?P<number>[0-9][0-9_]{0,39}(?:\.[0-9_]{0,39})?(?:e[+-]?[0-9]{1,3})?)\s*"
    r"(?P<multiplier>[kmbt]?)\s*(?P<unit>(?:step|sample|token)s?)?",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class Progress:
    """How far a run has come, counted from its first batch.

    Attributes:
        step: Batches in which at least one optimizer stepped.
        samples: Samples seen by all ranks together.
        tokens: Tokens seen by all ranks together; 0 where the run does not count tokens.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ProgressError(
                    f"{field.name}={value!r} is no count. Counters are integers of at least 0; "
                    f"pass totals since the start of the run."
                )

    def count(self, unit: Unit) -> int:
        """The counter of one unit."""
        return {"steps": self.step, "samples": self.samples, "tokens": self.tokens}[unit]

    def followed_by(self, given: "Progress | int") -> "Progress":
        """The counters after a further step; an integer is a number of steps.

        Raises:
            ProgressError: A counter went backwards.
        """
        after = given if isinstance(given, Progress) else Progress(step=given)
        if after.step <= self.step or after.samples < self.samples or after.tokens < self.tokens:
            raise ProgressError(
                f"observe() was given {after} after {self}. Steps must grow and other counters must not shrink; call "
                f"it once after each optimizer step with totals since the start of the run."
            )
        return after


@dataclass(frozen=True)
class Quantity:
    """A number of steps, samples or tokens.

    >>> Quantity.parse("8B tokens")
    Quantity(amount=8000000000, unit='tokens')
    >>> Quantity.parse(1000)
    Quantity(amount=1000, unit='steps')
    """

    amount: int
    unit: Unit = "steps"

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"

    @classmethod
    def parse(cls, value: object, *, key: str = "every", minimum: int = 1) -> "Quantity":
        """Read a quantity as people write it: `1000`, `"1000 steps"`, `"8B tokens"`, `"2e6 samples"`.

        Args:
            value: An integer (steps), or text with a number, an optional K, M, B or T, and an optional unit.
            key: Path of the configuration key, for the error message.
            minimum: Smallest amount that is allowed.

        Raises:
            ConfigError: The value is not a whole number of steps, samples or tokens, or is below `minimum`.
        """
        match = _QUANTITY.fullmatch(str(value).strip()) if isinstance(value, int | float | str) else None
        amount = _amount(match) if match else Fraction(-1)
        if isinstance(value, bool) or match is None or not minimum <= amount <= _LARGEST or amount.denominator > 1:
            raise ConfigError(
                f"{key}: {value!r} is not a quantity. Allowed: a whole number of at least {minimum} steps, samples or "
                f"tokens. Write it as 1000, '1000 steps', '8B tokens' or '2e6 samples'."
            )
        unit = (match["unit"] or "steps").lower()
        return cls(int(amount), next(known for known in UNITS if known.startswith(unit.removesuffix("s"))))


@dataclass(frozen=True)
class Cadence:
    """Every so many steps, samples or tokens, counted from the first batch of the run, not before `start`.

    Attributes:
        every: The interval V. It is due at V, 2V, 3V, …
        start: Nothing is due before this point; the multiples stay where they are.
    """

    every: Quantity
    start: Quantity = Quantity(0)

    def crossed(self, before: Progress, after: Progress) -> bool:
        """Whether a multiple of the interval, itself not before `start`, was reached after `before` and up to `after`.

        Where `start` counts in another unit, it must be reached by `after`.
        """
        last = self.index(before)
        if self.start.unit == self.every.unit:
            # a multiple before `start` is not due late because the counter jumped over both
            last = max(last, (self.start.amount - 1) // self.every.amount)
        return self.index(after) > last and after.count(self.start.unit) >= self.start.amount

    def due_after(self, progress: Progress, *, times: int = 1) -> Quantity:
        """Where it will be due next, or for the given number of times; `start` in another unit may delay it further."""
        first = self.index(progress) + 1
        if self.start.unit == self.every.unit:
            first = max(first, -(-self.start.amount // self.every.amount))
        return Quantity((first + times - 1) * self.every.amount, self.every.unit)

    def index(self, progress: Progress) -> int:
        """How many whole intervals lie behind: k for the block ((k-1)V, kV] that ends here or ended last."""
        return progress.count(self.every.unit) // self.every.amount


def _amount(match: re.Match[str]) -> Fraction:
    # exact: neither a float nor a Decimal tells 1.00000000000000000000000000001 from a whole number
    return Fraction(match["number"].replace("_", "")) * _MULTIPLIERS[match["multiplier"].upper()]
