"""The command `pretrain-merge wandb-view`: a workspace of a W&B project, saved there.

This module knows the command's options and where names come from. What the workspace holds is `records.wandb_view`'s
business.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pretrain_merge.cli.results import write_result
from pretrain_merge.errors import CheckpointError, ConfigError


def wandb_view(
    project: str,
    *,
    like: Path | None = None,
    runs: str | Sequence[str] = (),
    metric: str | None = None,
    name: str = "merge",
    axis: Literal["tokens", "step"] | None = None,
    title: str | None = None,
    json: Path | None = None,
) -> None:
    """Make a saved view of a W&B project: raw, merged and forecast in one chart, and how far apart the snapshots are.

    Args:
        project: entity/project, as in the project's address.
        like: A run on this machine, as `report` takes it, whose views and forecasts get lines of their own; default:
            lines by a pattern, whatever the project's runs have.
        runs: Id of the run to show, the end of its address, or several: '[3xk2a9, 81hd6s]'; default: all.
        metric: The metric to compare; default: the loss of the run of `like`, else val_loss.
        name: Of the callback; prefix of its metrics.
        axis: What the charts are drawn against; default: tokens, unless the run of `like` counts none.
        title: Of the view.
        json: Write the view's content here and save nothing; - is standard output.
    """
    from pretrain_merge.records import FORECAST, metric_names, plots, read_run
    from pretrain_merge.records.wandb_view import Names, workspace

    entity, _, rest = project.partition("/")
    if not entity or not rest or "/" in rest:
        raise ConfigError(f"project: {project!r} is not a project of W&B. Allowed: entity/project, as in its address.")
    records = read_run.read_run(like, name=name, needs_recipes=False) if like is not None else []
    if metric is None:
        metric = metric_names.to_show(records[-1].raw if records else ()) or "val_loss"
    forecasts = dict.fromkeys(key for record in records for key, known in record.forecasts.items() if metric in known)
    forecasts |= {
        key.removeprefix(f"{FORECAST}/"): None
        for record in records
        for key in record.skipped
        if key.startswith(f"{FORECAST}/")
    }
    # a run that does not count tokens has 0 everywhere: one column of points
    has_tokens = not records or records[-1].tokens > 0
    names = Names(
        metric=metric,
        name=name,
        views=tuple(plots.view_names(records)),
        forecasts=tuple(forecasts),
        axis=axis or ("tokens" if has_tokens else "step"),
        runs=(runs,) if isinstance(runs, str) else tuple(runs),
    )
    view = workspace(entity, rest, names, title=title)
    if json is not None:
        write_result(json, view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n")
        return
    try:
        view.save()
    except Exception as error:  # of W&B's client: no login, no network, no such project
        raise CheckpointError(
            f"the view was not saved in {project}: {str(error).rstrip('.')}. Log in with `wandb login`, or look at it "
            f"with --json -."
        ) from error
    print(f"Saved: {view.url}")
