"""When something is due: every so many steps, samples or tokens, fired on crossing a multiple.

This module knows counters and nothing else: no tensors, no trainer, no window. A cadence keeps no state. Whether it
fires is a function of the counters before and after, so a counter may jump over a multiple (several optimizers in one
batch, tokens counted in bulk, a resumed run) and the cadence still fires exactly once.

An interval is a fixed `Quantity`, or a `Share` of what was counted since the run or its last break began: it grows, so
that a number of intervals always reaches back over the same part of the run.
"""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass
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
_SHARE = re.compile(
    r"(?P<number>[0-9]{1,3}(?:\.[0-9]{1,12})?)\s*%\s*(?:of\s+)?(?P<unit>(?:step|sample|token)s?)?",
    re.IGNORECASE | re.ASCII,
)
_FURTHEST = 10**15  # floats tell neighbours apart up to here
_ROUNDING = 64  # counts; up to there an exponential is off by less
_LEAST_PERCENT, _MOST_PERCENT = 0.001, 50.0  # below, a window spans nothing; above, two snapshots span a third of a run


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
        # one is made at every step, and calls are what a step costs on which nothing is due
        if type(self.step) is type(self.samples) is type(self.tokens) is int and (
            self.step >= 0 and self.samples >= 0 and self.tokens >= 0
        ):
            return
        for name, value in (("step", self.step), ("samples", self.samples), ("tokens", self.tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ProgressError(
                    f"{name}={value!r} is not a count. Counters are integers of at least 0; "
                    f"pass totals since the start of the run."
                )

    def count(self, unit: Unit) -> int:
        """The counter of one unit."""
        return self.step if unit == "steps" else self.samples if unit == "samples" else self.tokens

    def next_step(self) -> "Progress":
        """The counters after one more step, of which nothing else is counted yet."""
        # these are counts already, and to check them again would be half of what a step costs on which nothing is due
        after = object.__new__(Progress)
        vars(after).update(step=self.step + 1, samples=self.samples, tokens=self.tokens)
        return after

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
        return cls(int(amount), _unit(match["unit"]))


@dataclass(frozen=True)
class Share:
    """An interval that grows: a percentage of what was counted since an origin, and at least one.

    The k-th point after the origin is where `index` reaches k: k itself up to the count of which the share is one, and
    from there on `(1 + ln(p t)) / p`, whose slope `1 / (p t)` makes two neighbours lie `p t` apart.

    Attributes:
        percent: Of the count, 0.001 to 50.
        unit: What is counted.
        stride: How many of these points make one: with 10, every tenth counts.

    >>> Share.parse("1%")
    Share(percent=1.0, unit='steps', stride=1)
    >>> [Share(10.0).reached(k) for k in (1, 10, 11, 20, 40)]  # one by one up to step 10, then a tenth apart
    [1, 10, 12, 28, 201]
    """

    percent: float
    unit: Unit = "steps"
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.percent:g}% of {self.unit}"

    @classmethod
    def parse(cls, value: object, *, key: str = "every") -> "Share":
        """Read a share as people write it: `"1%"`, `"0.5 % tokens"`, `"2% of samples"`.

        Raises:
            ConfigError: The value is not a percentage from 0.001 to 50, or its unit is unknown.
        """
        match = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
        percent = float(match["number"]) if match else math.nan
        if match is None or not _LEAST_PERCENT <= percent <= _MOST_PERCENT:
            raise ConfigError(
                f"{key}: {value!r} is not a share of the run so far. Allowed: {_LEAST_PERCENT:g}% to "
                f"{_MOST_PERCENT:g}%, of steps, samples or tokens. Write it as '1%' (of the steps) or '1% of tokens'."
            )
        return cls(percent, _unit(match["unit"]))

    @classmethod
    def spanning(cls, share: float, intervals: int, unit: Unit = "steps") -> "Share":
        """The largest one of one digit with which so many intervals reach over at most this part of the run.

        >>> Share.spanning(0.06, 9), Share.spanning(0.12, 9).percent
        (Share(percent=0.6, unit='steps', stride=1), 1.0)
        """
        percent = 100.0 * share / intervals
        digit = 10.0 ** math.floor(math.log10(percent))
        # the quotient of 0.6 and 0.1 is below 6
        exact = round(math.floor(percent / digit + 1e-9) * digit, 12)
        return cls(min(max(exact, _LEAST_PERCENT), _MOST_PERCENT), unit)

    def index(self, count: int) -> int:
        """How many points lie behind a count; 0 at the origin and before it."""
        share = self.percent / 100.0
        if count * share <= 1.0:
            return max(count, 0) // self.stride
        return math.floor((1.0 + math.log(count * share)) / share) // self.stride

    def reached(self, index: int) -> int:
        """The first count at which so many points lie behind; 10**15 at the most, beyond which no run counts."""
        share, points = self.percent / 100.0, index * self.stride
        if points * share <= 1.0:
            return points
        if points * share - 1.0 > math.log(_FURTHEST * share):
            return _FURTHEST
        count = math.ceil(math.exp(points * share - 1.0) / share)
        # the exponential rounds: look at the neighbours, so that this is the inverse of `index` to the last count
        neighbours = range(count - _ROUNDING, count + _ROUNDING)
        return neighbours[bisect_left(neighbours, index, key=self.index)]


Interval = Quantity | Share


def parse_interval(value: object, *, key: str = "every") -> Interval:
    """A fixed quantity, or a share of the run so far where the text has a percent sign.

    Raises:
        ConfigError: The value is neither.
    """
    if isinstance(value, str) and "%" in value:
        return Share.parse(value, key=key)
    try:
        return Quantity.parse(value, key=key)
    except ConfigError as error:
        raise ConfigError(f"{error} A share of the run so far is written as '10%'.") from error


@dataclass(frozen=True)
class Cadence:
    """Every so many steps, samples or tokens, not before `start`.

    Attributes:
        every: The interval V. A fixed one is due at V, 2V, 3V, … of the run; a share counts from `since`.
        start: Nothing is due before this point; the multiples stay where they are.
    """

    every: Interval
    start: Quantity = Quantity(0)

    def crossed(self, before: Progress, after: Progress, *, since: Progress = Progress()) -> bool:
        """Whether a multiple of the interval, itself not before `start`, was reached after `before` and up to `after`.

        Where `start` counts in another unit, it must be reached by `after`.

        Args:
            before: Counters at the observation before.
            after: Counters now.
            since: Where the stretch began of which the interval is a share; a fixed interval does not ask.
        """
        every, unit = self.every, self.every.unit
        # the answer at nearly every step of nearly every run, where it is asked twice
        if (
            unit == "steps"
            and isinstance(every, Quantity)
            and before.step // every.amount == after.step // every.amount
        ):
            return False
        last, now = self._index(before.count(unit), since), self._index(after.count(unit), since)
        if now > last and self.start.unit == self.every.unit:  # at most steps, it is not
            # a multiple before `start` is not due late because the counter jumped over both
            last = max(last, self._index(self.start.amount - 1, since))
        return now > last and after.count(self.start.unit) >= self.start.amount

    def due_after(self, progress: Progress, *, times: int = 1, since: Progress = Progress()) -> Quantity:
        """Where it will be due next, or for the given number of times; `start` in another unit may delay it further."""
        last = self.index(progress, since=since)
        if self.start.unit == self.every.unit:
            last = max(last, self._index(self.start.amount - 1, since))
        if isinstance(self.every, Share):
            count = since.count(self.every.unit) + self.every.reached(last + times)
            return Quantity(count, self.every.unit)
        return Quantity((last + times) * self.every.amount, self.every.unit)

    def index(self, progress: Progress, *, since: Progress = Progress()) -> int:
        """How many whole intervals lie behind: k for the block ((k-1)V, kV] that ends here or ended last."""
        return self._index(progress.count(self.every.unit), since)

    def is_beyond(self, progress: Progress, *, since: Progress = Progress()) -> bool:
        """Whether the last point lies behind, and not at, these counters."""
        count = progress.count(self.every.unit)
        if isinstance(self.every, Share):
            count -= since.count(self.every.unit)
            return count > self.every.reached(self.every.index(count))
        return count % self.every.amount > 0

    def _index(self, count: int, since: Progress) -> int:
        if isinstance(self.every, Share):
            return self.every.index(count - since.count(self.every.unit))
        return count // self.every.amount


class Upcoming:
    """A cadence that is asked at every step: where it is due next is worked out where it was due, not each time.

    Attributes:
        quiet: Steps at which it is surely not due, as long as the stretch began at `since`.
        since: Counters from which `quiet` was worked out, by identity.

    >>> hundreds = Upcoming(Cadence(Quantity(100)))
    >>> hundreds.crossed(Progress(99), Progress(100), since=Progress())
    True
    >>> hundreds.quiet
    range(101, 200)
    """

    def __init__(self, cadence: Cadence) -> None:
        self._cadence = cadence
        self.forget()

    def forget(self) -> None:
        """The counters go on from somewhere else."""
        self.quiet, self.since = range(0), Progress()

    def crossed(self, before: Progress, after: Progress, *, since: Progress) -> bool:
        """As the cadence's own, of counters that follow each other."""
        is_due = self._cadence.crossed(before, after, since=since)
        # what counts samples or tokens can be due at any step
        if self._cadence.every.unit == "steps":
            self.quiet = range(after.step + 1, self._cadence.due_after(after, since=since).amount)
            self.since = since
        return is_due


def _unit(written: str | None) -> Unit:
    unit = (written or "steps").lower().removesuffix("s")
    return next(known for known in UNITS if known.startswith(unit))


def _amount(match: re.Match[str]) -> Fraction:
    # exact: neither a float nor a Decimal tells 1.00000000000000000000000000001 from a whole number
    return Fraction(match["number"].replace("_", "")) * _MULTIPLIERS[match["multiplier"].upper()]
