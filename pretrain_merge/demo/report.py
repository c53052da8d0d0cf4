"""What the demo says: the comparison of raw, merged and annealed as numbers, as a table and as one sentence.

This module reads records and knows neither models nor trainers. Every word follows from the numbers: where the merge
did not help, it says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain_merge.records import Expected, MergeRecord
from pretrain_merge.records.tables import merges_table, percent

if TYPE_CHECKING:
    from pretrain_merge.demo.routing import Router, Routing

METRIC = "val_loss"
AHEAD, NOW = "ahead", "now"  # the forecasts of merge.yaml


@dataclass(frozen=True)
class Summary:
    """The demo's result. Losses are cross entropies in nats per byte, all on the same held-out bytes.

    Attributes:
        raw: Loss of the live model after the last step.
        merged: Loss of each view after the last step.
        annealed: Loss of the real annealing branch, which ends at the same step.
        forecast: What was expected of it when it left the run, from the merges up to that step; None: nothing.
        nowcast: What is expected of it at its end, from the merges of the run it left; None: nothing.
        steps: Length of the run.
        seconds: Training and annealing together, with all evaluations.
        best: The view with the smallest loss.
        gap_closed: `(raw - merged) / (raw - annealed)` of each view; None where the anneal did not lower the loss.
        better_than_raw: Of the merge points past the first quarter of the run, the share at which each view beats raw.
        window: Snapshots in the last merge.
        anneal_steps: Steps of the annealing branch.
        anneal_curve: Loss of the branch at its steps.
        model: Name of the model.
        parameters: Number of its parameters.
        tokens: Bytes that the run was trained on, counted with repetition.
        seconds_train: The run's part of `seconds`.
        seconds_anneal: The branch's part of `seconds`.
        routing: What the last merge did to the routers; None for a dense model.
    """

    raw: float
    merged: Mapping[str, float]
    annealed: float
    forecast: Expected | None
    nowcast: Expected | None
    steps: int
    seconds: float
    best: str
    gap_closed: Mapping[str, float | None]
    better_than_raw: Mapping[str, float]
    window: int
    anneal_steps: int
    anneal_curve: Mapping[int, float]
    model: str
    parameters: int
    tokens: int
    seconds_train: float
    seconds_anneal: float
    routing: "Routing | None" = None


def summarise(
    records: Sequence[MergeRecord],
    anneal_curve: Mapping[int, float],
    *,
    views: Sequence[str],
    model: str,
    parameters: int,
    seconds_train: float,
    seconds_anneal: float,
    routing: "Routing | None" = None,
) -> Summary:
    """Compare the last merge with the raw model and with the real anneal.

    Args:
        records: All merge points of the run; the last one is at its last step.
        anneal_curve: Loss of the branch from the step where it left the run to the run's last step.
        views: The views to compare; forecasts measure others.
        model: Name of the model.
        parameters: Number of its parameters.
        seconds_train: Wall-clock time of the run.
        seconds_anneal: Wall-clock time of the branch.
        routing: What the last merge did to the routers of a mixture of experts.
    """
    last = records[-1]
    raw, annealed = last.raw[METRIC], anneal_curve[last.step]
    merged = {view: last.views[view][METRIC] for view in views if view in last.views}
    # the forecast of the moment at which the branch left, not a later one that saw more
    start = next((record for record in records if record.step == min(anneal_curve)), None)
    # early merges lag behind a loss that still falls fast
    late = [record for record in records if record.step > last.step / 4]
    return Summary(
        raw=raw,
        merged=merged,
        annealed=annealed,
        forecast=start.forecasts.get(AHEAD, {}).get(METRIC) if start else None,
        nowcast=last.forecasts.get(NOW, {}).get(METRIC),
        steps=last.step,
        seconds=seconds_train + seconds_anneal,
        best=min(merged, key=lambda view: merged[view]),
        # where the anneal did not lower the loss there is no gap, and the share would be of noise
        gap_closed={view: (raw - loss) / (raw - annealed) if raw > annealed else None for view, loss in merged.items()},
        better_than_raw={view: sum(_beats_raw(record, view) for record in late) / len(late) for view in merged},
        window=last.window,
        anneal_steps=last.step - min(anneal_curve),
        anneal_curve=dict(anneal_curve),
        model=model,
        parameters=parameters,
        tokens=last.tokens,
        seconds_train=seconds_train,
        seconds_anneal=seconds_anneal,
        routing=routing,
    )


def show(records: Sequence[MergeRecord], summary: Summary, out: Path) -> None:
    """Print the table, the comparison, where the files are, and what was seen."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        merges_table(
            records,
            METRIC,
            title="Validation loss in nats per byte, raw and merged on the same bytes",
            views=list(summary.merged),
            forecast=NOW if summary.nowcast else None,
            gap_closed={summary.steps: summary.gap_closed[summary.best]},
        )
    )
    console.print(f"\n{comparison(summary)}\n{forecasts(summary)}", style="bold", soft_wrap=True)
    if summary.routing is not None:
        console.print(f"\n{routers(summary.routing)}", soft_wrap=True)
    console.print(
        f"\nIn {out}: curves.png, summary.json, merges.jsonl, merged/ (safetensors), wandb/ (an offline run).\n"
        f"Training took {summary.seconds_train:.0f} s and annealing {summary.seconds_anneal:.0f} s.\n",
        markup=False,
        soft_wrap=True,
    )
    console.print(sentence(summary))


def comparison(summary: Summary) -> str:
    """Raw, merged and annealed in one line."""
    return (
        f"raw {summary.raw:.4f}  |  merged ({summary.best}) {summary.merged[summary.best]:.4f}  |  "
        f"annealed {summary.annealed:.4f}  |  gap closed {percent(summary.gap_closed[summary.best])}"
    )


def forecasts(summary: Summary) -> str:
    """What was expected of the anneal, before and after, beside what it reached."""
    start = summary.steps - summary.anneal_steps
    return "\n".join(
        [
            _expected(summary.forecast, summary.annealed, f"forecast at step {start}"),
            _expected(summary.nowcast, summary.annealed, f"nowcast at step {summary.steps}"),
        ]
    )


def _expected(expected: Expected | None, annealed: float, name: str) -> str:
    if expected is None:
        return f"{name}: none, the run is too short for one"
    # a window that grows spans a little less where the branch starts than at its end
    holds = "holds" if expected.low <= annealed <= expected.high else "does not hold"
    return (
        f"{name}, for step {expected.step}: {expected.mean:.4f} ({expected.low:.4f} to {expected.high:.4f}), "
        f"{expected.mean / annealed - 1:+.2%} "
        f"from the annealed {annealed:.4f}; the interval {holds} it"
    )


def routers(routing: "Routing") -> str:
    """What merging did to the routers, in three lines."""

    def of(name: str, router: "Router") -> str:
        shares = [share for layer in router.load for share in layer]
        return (
            f"routers of the {name} model: {min(shares):.0%} to {max(shares):.0%} of a layer's choices on an expert "
            f"(balance {router.balance:.3f}), entropy of a token's choice {router.entropy:.3f} of the largest"
        )

    return "\n".join(
        [
            of("raw", routing.raw),
            of("merged", routing.merged),
            f"the merge exchanges {routing.drift:.1%} of the chosen experts; training over the stretch that it spans "
            f"exchanged {routing.drift_of_training:.1%}",
        ]
    )


def sentence(summary: Summary) -> str:
    """What the user just saw."""
    merged, closed = summary.merged[summary.best], summary.gap_closed[summary.best]
    before = (
        f"What you just saw: a {summary.model} of {summary.parameters:,} parameters trained for {summary.steps} steps "
        f"without ever lowering its learning rate, and a merge of its last {summary.window} snapshots "
    )
    # the sentence is printed whatever came out; it may not claim what was not seen
    if closed is None or merged >= summary.raw:
        return before + (
            f"({summary.best}: {merged:.4f}) did not tell what a real anneal reaches ({summary.annealed:.4f}; raw "
            f"{summary.raw:.4f}), as happens when a run is too short or its learning rate too low for merging."
        )
    return before + (
        f"({summary.best}) has a loss of {merged:.4f} instead of {summary.raw:.4f}, {closed:.0%} of the way down to "
        f"the {summary.annealed:.4f} that {summary.anneal_steps} steps of real annealing reach; the merge took no "
        f"training at all."
    )


def _beats_raw(record: MergeRecord, view: str) -> bool:
    return view in record.views and record.views[view][METRIC] < record.raw[METRIC]
