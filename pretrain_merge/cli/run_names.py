"""What runs are called in tables, pictures and pages. This module knows paths, and opens none."""

from collections.abc import Sequence
from pathlib import Path


def folder_of(run: Path) -> Path:
    """The folder of a run, which a user names itself or by a file in it."""
    return run if run.is_dir() else run.parent


def run_names(runs: Sequence[Path]) -> dict[Path, str]:
    """What the runs are called: the ends of their paths, as long as it takes to tell them apart."""
    parts = {run: folder_of(run).absolute().parts[1:] or ("/",) for run in runs}
    # the shortest ends of paths that tell the runs apart, with the folder above: many are called `run`
    for length in range(2, max(map(len, parts.values())) + 1):
        names = {run: "/".join(part[-length:]) for run, part in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {run: str(run) for run in runs}  # files of one folder
