"""The command `pretrain-merge`: one typed function per subcommand, turned into a command line by jsonargparse.

This module knows names and defaults of arguments. Whatever a subcommand does is imported when it runs.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pretrain_merge._version import __version__
from pretrain_merge.cli.arguments import as_one_list
from pretrain_merge.errors import MissingDependencyError, PretrainMergeError

_OTHERS = ("report", "forecast", "plan", "merge", "sweep", "export", "wandb-view")  # each in a module of its name


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
            _run()
        finally:
            # here and not as Python ends, where nobody could tell a reader who has left from a fault
            sys.stdout.flush()
    except BrokenPipeError:
        _end_unread()
        raise


def _end_unread() -> None:
    """End quietly, with exit code 1, where whoever read our standard output has left: `| head -1` has what it wants."""
    try:
        # any other pipe's error is a fault, which keeps its traceback: this one's is seen by writing once more
        print(flush=True)
    except BrokenPipeError:
        # Python flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run() -> None:
    try:
        try:
            from jsonargparse import auto_cli
        except ImportError as error:
            raise MissingDependencyError(
                "The command line needs jsonargparse, which is not installed. Run: pip install 'pretrain-merge[cli]'"
            ) from error
        words = sys.argv[1:]
        auto_cli(
            _commands(words[:1]),
            args=as_one_list(words),
            as_positional=True,
            prog="pretrain-merge",
            version=__version__,
        )
    # users' own mistakes end in a sentence; any other exception is a fault of ours and keeps its traceback
    except PretrainMergeError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _commands(asked: list[str]) -> dict[str, Any]:
    """The command that is asked for; all of them where it is none, as for help."""
    found: dict[str, Any] = {"demo": demo}
    for name in _OTHERS:
        # what a merge is done in a forecast would take a tenth of to load
        if asked == [name] or not {*asked} & {*_OTHERS}:
            own = name.replace("-", "_")
            found[name] = getattr(import_module(f"pretrain_merge.cli.{own}"), own)
    return found


if __name__ == "__main__":
    main()
