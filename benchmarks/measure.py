"""Timing side by side: candidates take turns in one process, so that what else the machine does hits all of them alike.

Knows callables, a yardstick and how to show the result. Knows nothing of what is measured.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

Action = Callable[[], Any]


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with what all of them take."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as one JSON list")
    parser.add_argument("--threads", type=int, help="of torch and of our kernel (default: torch's choice)")
    parser.add_argument("--device", help="default: cuda if there is one")
    return parser


def chosen_device(options: argparse.Namespace) -> torch.device:
    """The device of the command line; sets torch's threads as it says."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a candidate took, round by round, and how long the yardstick took in the same rounds.

    Attributes:
        seconds: One entry per round.
        yardstick: The yardstick's median in the same round.
    """

    seconds: tuple[float, ...]
    yardstick: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Time in units of the yardstick, round by round: a slow spell of the machine cancels out."""
        return tuple(own / unit for own, unit in zip(self.seconds, self.yardstick, strict=True))

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def times_slower_than(self, other: "Timing") -> float:
        """Median over rounds of this candidate's time divided by the other's."""
        return statistics.median(own / their for own, their in zip(self.ratios, other.ratios, strict=True))


def interleave(
    candidates: Mapping[str, Action], yardstick: Action, *, rounds: int, device: torch.device, label: str
) -> dict[str, Timing]:
    """Time all candidates in turns, with the yardstick before each of them.

    Args:
        candidates: What to time, by name. Each is run once before, which compiles and touches its memory.
        yardstick: The unit; its time in a round is the median of its runs in that round.
        rounds: How often each candidate is timed.
        device: Waited for before and after each run.
        label: What the progress bar says.
    """
    for action in (yardstick, *candidates.values()):
        _seconds(action, device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    unit: list[float] = []
    for _ in track(range(rounds), description=label, console=Console(stderr=True), transient=True):
        yardsticks = []
        for name, action in candidates.items():
            yardsticks.append(_seconds(yardstick, device))
            seconds[name].append(_seconds(action, device))
        unit.append(statistics.median(yardsticks))
    return {name: Timing(tuple(own), tuple(unit)) for name, own in seconds.items()}


def machine(device: torch.device) -> str:
    """The processor, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def provenance(module: str, text_digest: str, *packages: str) -> dict[str, str]:
    """What a committed result says of how it came about.

    Args:
        module: Of the benchmark, as after `python -m`.
        text_digest: Of what was trained on.
        packages: Whose versions matter, beside torch and this one.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "text_digest": text_digest,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages, "pretrain-merge")},
        "machine": machine(torch.device("cpu")),
    }


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table. `columns` maps headings to keys of a row; numbers are right-aligned with three digits."""
    table = Table(title=title, title_justify="left")
    for heading, key in columns.items():
        table.add_column(heading, justify="right" if isinstance(rows[0][key], int | float) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_format(row[key]) for key in columns.values()))
    console = Console()
    # a pipe counts as 80 wide, which would cut the numbers
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON list, or nothing where no file was asked for."""
    if path is not None:
        path.write_text(json.dumps([dict(row) for row in rows], indent=1) + "\n")


def _seconds(action: Action, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _format(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
