"""The command `pretrain-merge`: one typed function per subcommand, turned into a command line by jsonargparse.

This module knows names and defaults of arguments. Whatever a subcommand does is imported when it runs.
"""

import sys
from pathlib import Path
from typing import Literal

from pretrain_merge._version import __version__
from pretrain_merge.cli.export import export
from pretrain_merge.cli.forecast import forecast
from pretrain_merge.cli.merge import as_one_list, merge
from pretrain_merge.cli.plan import plan
from pretrain_merge.cli.sweep import sweep
from pretrain_merge.errors import MissingDependencyError, PretrainMergeError, printable

_ROWS = 30  # of a report: a screen


def demo(model: Literal["llama", "moe"] = "llama", out: Path = Path("runs/demo"), seed: int = 0) -> None:
    """Pre-train a small language model with merging on, then check the merge against one real anneal.

    Args:
        model: A dense Llama, or a small mixture of experts.
        out: Folder of the run; a folder of an earlier demo is replaced.
        seed: Draws weights and data.
    """
    # before torch: the package says how its threads wait
    from pretrain_merge.demo.experiment import Experiment
    from pretrain_merge.demo.run import demo as run_demo

    run_demo(Experiment(family=model, seed=seed), out=out)


def report(
    run: Path,
    metric: str = "val_loss",
    mode: Literal["min", "max"] | None = None,
    all: bool = False,  # noqa: A002 - the option's name
    name: str = "merge",
    picture: Path | None = None,
) -> None:
    """Print the merges of a run as a table, and draw its curves.

    Args:
        run: A run's folder, its merges.jsonl, a CSV of its metrics, or the .wandb file of an offline run.
        metric: The metric to compare.
        mode: Whether its smallest value is the best or its largest; default: as its name tells.
        all: Print every merge; else the first, the best, the last, and some between.
        name: Prefix of the metrics, for a CSV or a W&B run.
        picture: Where the picture goes; default: report.png in the run's folder.
    """
    from pretrain_merge.cli.results import console_beside
    from pretrain_merge.records import plots
    from pretrain_merge.records.read_run import read_run
    from pretrain_merge.records.tables import merges_table

    console = console_beside()
    records = read_run(run, name=name, needs_recipes=False)
    table = merges_table(records, metric, mode=mode, at_most=None if all else _ROWS)
    if table.caption:
        table.caption = f"{table.caption}; --all prints every one"
    figure = plots.curves(records, metric=metric)
    target = picture or (run if run.is_dir() else run.parent) / "report.png"
    plots.save(figure, target)
    console.print(table)
    console.print(f"Curves: {printable(target)}", soft_wrap=True, markup=False)


def main() -> None:
    """Run a subcommand; errors of ours end it with their message and exit code 1."""
    try:
        try:
            from jsonargparse import auto_cli
        except ImportError as error:
            raise MissingDependencyError(
                "The command line needs jsonargparse, which is not installed. Run: pip install 'pretrain-merge[cli]'"
            ) from error
        auto_cli(
            [demo, report, forecast, plan, merge, sweep, export],
            args=as_one_list(sys.argv[1:]),
            as_positional=True,
            prog="pretrain-merge",
            version=__version__,
        )
    except PretrainMergeError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
