"""The command `pretrain-merge`: one typed function per subcommand, turned into a command line by jsonargparse.

This module knows names and defaults of arguments. Whatever a subcommand does is imported when it runs.
"""

import sys
from pathlib import Path
from typing import Literal

from pretrain_merge._version import __version__
from pretrain_merge.cli.arguments import as_one_list
from pretrain_merge.cli.export import export
from pretrain_merge.cli.forecast import forecast
from pretrain_merge.cli.merge import merge
from pretrain_merge.cli.plan import plan
from pretrain_merge.cli.report import report
from pretrain_merge.cli.sweep import sweep
from pretrain_merge.cli.wandb_view import wandb_view
from pretrain_merge.errors import MissingDependencyError, PretrainMergeError


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


def main() -> None:
    """Run a subcommand; errors of ours end it with their message and exit code 1."""
    try:
        try:
            from jsonargparse import auto_cli
        except ImportError as error:
            raise MissingDependencyError(
                "The command line needs jsonargparse, which is not installed. Run: pip install 'pretrain-merge[cli]'"
            ) from error
        commands = (demo, report, forecast, plan, merge, sweep, export, wandb_view)
        auto_cli(
            {command.__name__.replace("_", "-"): command for command in commands},
            # explicit: jsonargparse would read sys.argv as it was typed
            args=as_one_list(sys.argv[1:]),
            as_positional=True,
            prog="pretrain-merge",
            version=__version__,
        )
    # users' own mistakes end in a sentence; any other exception is a fault of ours and keeps its traceback
    except PretrainMergeError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
