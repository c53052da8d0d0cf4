"""The command `pretrain-merge sweep`: what merges of old checkpoints would have measured, as a run's folder.

This module knows the command's options and what it prints. The work is that of `pretrain_merge.offline`.
"""

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pretrain_merge.cli.loading import loading

if TYPE_CHECKING:
    from pretrain_merge.offline.comparison import Comparison
    from pretrain_merge.offline.sweep import SweepPlan

_ROWS = 30  # of the table: a screen


def sweep(
    checkpoints: list[str],
    *,
    evaluate: str,
    out: str,
    window: int = 10,
    views: list[str | dict[str, Any]] | None = None,
    span: float | str | None = 0.06,
    intervals: list[int] | None = None,
    every: int | str | None = None,
    start: int | str = 0,
    merge_every: int | str | None = None,
    breaks: dict[str, bool] | None = None,
    lr_tolerance: float = 1e-3,
    steps: list[int] | None = None,
    base: str | None = None,
    newest: list[str] | None = None,
    average: list[str] | None = None,
    allow: list[str] | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    plan: bool = False,
    quiet: bool = False,
) -> None:
    """Evaluate merges of checkpoints that a run left, and say which window would have been best.

    Args:
        checkpoints: Files and folders.
        evaluate: A configuration of LightningCLI (config.yaml); package.module:function, which returns a module and its
            validation loaders; or a command in quotes that takes a folder and prints JSON on its last line.
        out: The folder to be made, for report and forecast; after a kill the same command goes on.
        window: Checkpoints that may be merged with each other.
        views: As in the callback: '[sma, sma4, wsm]'; default: plain means of 2, 4, 8, …, sma and wsm.
        span: Views that name no number take the newest that span this share of the run; null: all of the window.
        intervals: Views of a fixed number are also made of every so-many-th checkpoint; default: '[1, 2]'.
        every: Steps between checkpoints that are used; default: each is.
        start: No checkpoint before this step.
        merge_every: Merge at the first checkpoint at or after each multiple; default: at each.
        breaks: '{lr: false}' merges across changes of the learning rate.
        lr_tolerance: Relative change of a learning rate that counts as one.
        steps: Of the checkpoints, where neither content nor name says them.
        base: A checkpoint with tensors that these lack; for a command, a folder with config.json.
        newest: Patterns of tensors that come from the newest checkpoint of a merge.
        average: Patterns of running statistics of BatchNorm to merge.
        allow: Classes of your own that checkpoints hold, as package.module.Class: passed over, never imported.
        metric: By which views are compared; default: the loss.
        mode: Whether its smallest value is the best or its largest; default: as its name tells.
        plan: Only say how many evaluations that takes.
        quiet: No progress bar.
    """
    with loading():
        # with torch, which takes seconds that --help does not wait for
        from pretrain_merge.offline import sweep as offline
        from pretrain_merge.offline import users_code

    users_code.allow(allow or ())
    options: dict[str, Any] = {
        "window": window, "views": views, "span": span, "intervals": intervals or (1, 2), "every": every,
        "start": start, "merge_every": merge_every, "breaks": breaks, "lr_tolerance": lr_tolerance, "steps": steps,
        "base": base, "newest": newest or (), "average": average or (),
    }  # fmt: skip
    if plan:
        _print_plan(offline.plan_sweep(checkpoints, out, **options))
        return
    with _progress_bar(hidden=quiet) as progress:
        found = offline.sweep_checkpoints(
            checkpoints, out, evaluate, metric=metric, mode=mode, progress=progress, **options
        )
    _print_table(found, mode, out)
    for line in _verdict(found.comparison):
        print(line)
    print(f"Go on: pretrain-merge forecast {shlex.quote(out)}")


def _verdict(comparison: "Comparison") -> list[str]:
    """Which view is best, how much better than raw, and than the next one."""
    gain, margin, metric = comparison.gains[comparison.best], comparison.margin, comparison.metric
    better = "better" if gain.mean > 0 else "worse"
    lines = [
        f"Best: {comparison.best}, whose {metric} is {gain.absolute} {better} than raw on average of {gain.num_points} "
        f"merge point{'s' if gain.num_points > 1 else ''}{_in_errors(gain.in_errors)}."
    ]
    if comparison.next:
        # a best of many views is best by luck, too
        told = "" if comparison.is_clear else " The two are not told apart."
        lines.append(f"It is {margin} better than {comparison.next}, the next one{_in_errors(margin.in_errors)}.{told}")
    if comparison.left_out:
        lines.append(f"Not compared, being made at too few merge points: {', '.join(comparison.left_out)}.")
    return lines


def _in_errors(number: float) -> str:
    return "" if math.isnan(number) else f", {abs(number):.1f} standard errors"


def _print_table(found: Any, mode: Literal["min", "max"] | None, out: str) -> None:
    # with rich, which comes with an extra
    from pretrain_merge.cli.merges_table import print_merges
    from pretrain_merge.cli.results import console_beside
    from pretrain_merge.records.modes import mode_of

    metric, report = found.comparison.metric, f"pretrain-merge report {shlex.quote(out)}"
    print_merges(
        console_beside(), found.records, metric, mode or mode_of(metric), at_most=_ROWS,
        all_rows=f"{report} --all prints every one", all_views=f"{report} --html swept.html shows them",
    )  # fmt: skip


def _print_plan(plan: "SweepPlan") -> None:
    print(f"checkpoints  {plan.checkpoints}")
    print(f"views        {', '.join(plan.views)}")
    print(f"points       {plan.points}")
    print(f"evaluations  {plan.evaluations}, raw ones included")


@contextmanager
def _progress_bar(*, hidden: bool) -> Iterator[Any]:
    from tqdm import tqdm

    # None: shown on a terminal only
    with tqdm(unit=" evaluations", desc="swept", disable=hidden or None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
