"""What the terms of the law count, and how wrong it then is: numbers fitted to real anneals.

This module knows how a calibration predicts, and how it is kept in a file. The one that ships was fitted to the suite
of `benchmarks/annealing` by `python -m benchmarks.forecast --calibrate`; `fitting` makes others.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from pretrain_merge.errors import CheckpointError, ForecastError
from pretrain_merge.files import atomic, untrusted
from pretrain_merge.forecast.law import DOUBTS, TERMS, Reading

SHIPPED = Path(__file__).with_name("calibration.json")
LEAST_ERROR = 1e-4  # of the loss: no forecast is surer
_MOST_BYTES = 2**20  # a calibration has 3,000
_LARGEST = 1e12  # of a number in it
_GAIN = 0.2  # standard deviation of c1 between the suite's runs
_WIDEST = 4.0  # times the interval: farther outside of what was calibrated nothing is said


@dataclass(frozen=True)
class Calibration:
    """Coefficients, expected errors, and the anneals that they were fitted to.

    Attributes:
        coefficients: One for each of `law.TERMS`.
        prior: Covariance of the coefficients between runs: how far one run's own may be from these.
        errors: One for each of `law.DOUBTS`, at least 0: the error that is expected per unit of doubt.
        levels: Coverages, ascending.
        quantiles: For each level, how many expected errors hold that share of the true errors.
        shares: Smallest and largest length of the anneals, as shares of the steps before.
        latest: Last step at which one of them ended.
        num_runs: How many runs they belong to.
        source: Where they come from.
    """

    coefficients: tuple[float, ...]
    prior: tuple[tuple[float, ...], ...]
    errors: tuple[float, ...]
    levels: tuple[float, ...]
    quantiles: tuple[float, ...]
    shares: tuple[float, float]
    latest: float
    num_runs: int
    source: str

    def expected(self, reading: Reading) -> float:
        """The annealed loss; above 0, as every loss is."""
        change = float(reading.terms @ np.array(self.coefficients))
        if change > -0.5:
            return reading.base * (1.0 + change)
        return reading.base * math.exp(2.0 * change + 1.0) / 2.0  # the line's tangent there, which never crosses 0

    def expected_error(self, reading: Reading) -> float:
        """The typical error of `expected`, relative to the loss."""
        return max(LEAST_ERROR, float(reading.doubts @ np.array(self.errors)))

    def half_width(self, reading: Reading, coverage: float) -> float:
        """Half of the interval that holds a share of true losses, in the loss's own unit.

        Raises:
            ForecastError: So many runs cannot tell the coverage, or the anneal is too far from those calibrated on.
        """
        width = self.quantile(coverage) * self.expected_error(reading) * self.widening(reading)
        return reading.base * (math.hypot(width, self.drift(reading, coverage)) + reading.unlike)

    def quantile(self, coverage: float) -> float:
        """How many expected errors hold a share of the true errors.

        Raises:
            ForecastError: So many runs cannot tell.
        """
        if not self.levels[0] <= coverage <= self.levels[-1]:
            raise ForecastError(
                f"coverage {coverage:g}: {self.num_runs} runs tell intervals of {self.levels[0]:g} to "
                f"{self.levels[-1]:g}. Ask for one of these."
            )
        return float(np.interp(coverage, self.levels, self.quantiles))

    def drift(self, reading: Reading, coverage: float) -> float:
        """How far the gain may have moved where an anneal ends later than any that was calibrated on, relative.

        Between runs it differs by `_GAIN`; it is let differ by as much again for each e-fold of length.
        """
        beyond = math.log(max(1.0, reading.end / self.latest))
        normal = NormalDist().inv_cdf((1.0 + coverage) / 2.0)
        return normal * _GAIN * beyond * reading.gap * reading.steps / reading.end

    def interval(self, reading: Reading, coverage: float) -> tuple[float, float]:
        """Both ends of the interval; the lower one is as far away as a ratio, so that it stays above 0.

        Raises:
            ForecastError: As `half_width` does.
        """
        mean = self.expected(reading)
        half = self.half_width(reading, coverage)
        return mean * math.exp(-half / mean), mean + half

    def widened_by(self, reading: Reading, doubt: str) -> float:
        """How many times wider the interval is for one of `law.DOUBTS`."""
        part = float(reading.doubts[DOUBTS.index(doubt)]) * self.errors[DOUBTS.index(doubt)]
        return self.expected_error(reading) / max(LEAST_ERROR, self.expected_error(reading) - part)

    def widening(self, reading: Reading) -> float:
        """By what the interval is multiplied where the anneal's share of training is outside of what was calibrated.

        Raises:
            ForecastError: It is too far outside.
        """
        shortest, longest = self.shares
        factor = max(1.0, shortest / reading.share, (reading.share / longest) ** 2)
        if not factor <= _WIDEST:
            raise ForecastError(
                f"an anneal of {reading.steps:g} steps is {reading.share:.1%} of the steps so far, and the "
                f"calibration covers {shortest:.1%} to {longest:.1%}; forecasts reach from {shortest / _WIDEST:.1%} to "
                f"{longest * math.sqrt(_WIDEST):.1%}. Ask for a length within these, or calibrate on anneals like it."
            )
        return factor

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            CheckpointError: The disk refuses.
        """
        try:
            atomic.write(path, json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}. Name a file in a folder that exists.") from error

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing or is not a calibration.
        """
        try:
            values = untrusted.read_json(path, at_most=_MOST_BYTES)
            calibration = cls(**{key: _tuples(value) for key, value in values.items()})
            _refuse_impossible(calibration)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not a calibration: {error}. Name a file that `Calibration.save` wrote, or give none for "
                f"the one that ships."
            ) from error
        return calibration


@cache
def shipped() -> Calibration:
    """The calibration that comes with the package."""
    return Calibration.load(SHIPPED)


def _refuse_impossible(item: Calibration) -> None:
    """Raise a ValueError for what no fit gives: every number in it goes into every forecast."""
    vectors = (item.coefficients, *item.prior, item.errors, item.levels, item.quantiles, item.shares, (item.latest,))
    if not isinstance(item.source, str) or type(item.num_runs) is not int:
        raise ValueError("num_runs is to be a whole number, and source a text")
    if not all(type(number) in (int, float) and abs(number) < _LARGEST for vector in vectors for number in vector):
        raise ValueError("its values are to be finite numbers")
    sizes = [len(item.coefficients), *map(len, item.prior), len(item.errors), len(item.shares)]
    if sizes != [len(TERMS), *[len(TERMS)] * len(TERMS), len(DOUBTS), 2]:
        raise ValueError(f"{sizes} numbers, for another law")
    if not item.levels or len(item.levels) != len(item.quantiles):
        raise ValueError("it has to have a quantile for each level")
    if not all(lower < upper for lower, upper in pairwise(item.levels)) or item.shares[0] > item.shares[1]:
        raise ValueError("levels and shares are to ascend")
    if min(*item.levels, *item.shares, item.latest) <= 0 or min(*item.errors, *item.quantiles) < 0:
        raise ValueError("levels, shares and latest are to be positive, errors and quantiles not negative")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
