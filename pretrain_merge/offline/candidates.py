"""What a sweep asks of a way to evaluate: the metrics of one merge. And the way that goes through folders.

This module knows merged folders, programs and functions that are given one. It knows no Trainer.
"""

import json
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pretrain_merge.errors import ConfigError, EvaluationError
from pretrain_merge.files import atomic
from pretrain_merge.offline.merge import write_scratch
from pretrain_merge.offline.tensors import Source

Metrics = dict[str, float]
_SAID = 2000  # characters of what a program printed that an error repeats
_PLACE = "{folder}"


@dataclass(frozen=True)
class Candidate:
    """A merge to be evaluated; of one checkpoint, that one as it is.

    Attributes:
        label: For messages.
        sources: Oldest first; the newest gives what is not merged.
        coefficients: One for each.
    """

    label: str
    sources: tuple[Source, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What was seen of a candidate.

    Attributes:
        metrics: By name.
        spread: Relative RMS distance of its sources from their mean.
    """

    metrics: Metrics
    spread: float


class Bench(AbstractContextManager["Bench"], Protocol):
    """A way to evaluate, in a context of its own."""

    def begin(self, sources: Sequence[Source]) -> None:
        """These checkpoints are needed from now on, and no others."""

    def measure(self, candidate: Candidate) -> Measured:
        """Evaluate it on the same data, with the same random numbers, as every other one."""

    def spread(self, sources: Sequence[Source]) -> float:
        """Relative RMS distance of checkpoints from their mean; nothing is evaluated."""


class FolderBench(Bench):
    """Evaluates candidates as folders, each of which is gone when it was evaluated.

    Args:
        evaluate: Gets a folder as `merge_checkpoints` writes it; returns metrics.
        scratch: Where the folder is made.
        options: Of a merge.
    """

    def __init__(
        self, evaluate: Callable[[Path], Mapping[str, Any]], scratch: Path, options: Mapping[str, Any]
    ) -> None:
        self._evaluate, self._scratch, self._options = evaluate, scratch, options

    def __enter__(self) -> "FolderBench":
        return self

    def __exit__(self, *_: object) -> None:
        atomic.delete(self._scratch)

    def begin(self, sources: Sequence[Source]) -> None:
        """Nothing is kept of them."""

    def measure(self, candidate: Candidate) -> Measured:
        """Write the folder, and call the function."""
        atomic.delete(self._scratch)  # of the candidate before, or of a process that was killed
        folder = self._scratch / "model"
        about = write_scratch(candidate.sources, folder, list(candidate.coefficients), **self._options)
        return Measured(numbers(candidate.label, self._evaluate(folder)), about["spread"])

    def spread(self, sources: Sequence[Source]) -> float:
        """Of a merge that nobody evaluates."""
        atomic.delete(self._scratch)
        even = [1 / len(sources)] * len(sources)
        return float(write_scratch(sources, self._scratch / "model", even, **self._options)["spread"])


class Program:
    """A command as a function from a folder to what it prints: JSON, on the last line of its output.

    Args:
        command: Words as in a shell; `{folder}` is where the folder goes, else it is the last word.

    Raises:
        ConfigError: It is empty.
    """

    def __init__(self, command: str) -> None:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"evaluate: {command!r} is not a command ({error}). Close its quotes.") from error
        if not words:
            raise ConfigError("evaluate: '' is not a command. Name one that takes a folder and prints JSON.")
        self._words = words if any(_PLACE in word for word in words) else [*words, _PLACE]

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        """Run it.

        Raises:
            EvaluationError: It fails, or prints no JSON object of numbers.
        """
        # no shell: a folder's name is one word whatever is in it
        words = [word.replace(_PLACE, str(folder)) for word in self._words]
        try:
            # the bar is ours, so what it says of itself is shown only where it fails
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        except OSError as error:
            raise EvaluationError(
                f"{shlex.join(words)} cannot be run: {error}. Name a program that is there."
            ) from error
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-_SAID:] or "it said nothing"
            raise EvaluationError(
                f"{shlex.join(words)} ended with code {done.returncode}: {said.rstrip('.')}. Run it by hand on a "
                f"folder of pretrain-merge merge, then sweep again: finished points are kept."
            )
        # programs print warnings and tables before, and an empty line behind
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        try:
            found = json.loads(lines[-1])
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except (ValueError, IndexError, RecursionError) as error:
            raise EvaluationError(
                f"{shlex.join(words)} printed as its last line {(lines or [''])[-1][:200]!r}, and a JSON object of "
                f'numbers is needed: {{"val_loss": 2.31}}. Print it last.'
            ) from error
        return found


def numbers(label: str, metrics: Any) -> Metrics:
    """Metrics as plain numbers.

    Raises:
        EvaluationError: They are not, or there is none.
    """
    try:
        # float: tensors and NumPy's numbers, which JSON would refuse
        found = {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise EvaluationError(
            f"{label}: the evaluation gave {str(metrics)[:200]}, of which not every value is a number. Return a "
            f"mapping from names to numbers."
        ) from error
    if not found:
        raise EvaluationError(
            f"{label}: the evaluation gave no metric. Log one in validation_step, or print or return one."
        )
    return found
