"""The command `pretrain-merge`: one typed function per subcommand, turned into a command line by jsonargparse.

This module knows names and defaults of arguments. Whatever a subcommand does is imported when it runs.
"""

import sys
from pathlib import Path
from typing import Literal

from pretrain_merge.cli.forecast import forecast
from pretrain_merge.cli.plan import plan
from pretrain_merge.errors import MissingDependencyError, PretrainMergeError, printable


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


def report(run: Path, metric: str = "val_loss", picture: Path | None = None) -> None:
    """Print the merges of a run as a table, and draw its curves.

    Args:
        run: A run's folder, or its merges.jsonl.
        metric: The metric to compare.
        picture: Where the picture goes; default: report.png beside merges.jsonl.
    """
    from rich.console import Console

    from pretrain_merge.records import plots, read_records
    from pretrain_merge.records.tables import merges_table

    path = run if run.is_file() else run / "merges.jsonl"
    records = read_records(path)
    table, figure = merges_table(records, metric), plots.curves(records, metric=metric)
    target = picture or path.with_name("report.png")
    plots.save(figure, target)
    console = Console(highlight=False)
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
        auto_cli([demo, report, forecast, plan], as_positional=True, prog="pretrain-merge")
    except PretrainMergeError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
