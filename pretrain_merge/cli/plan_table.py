"""A plan to a table in the terminal: every figure beside the arithmetic that gave it. This module knows rich."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pretrain_merge.cadence import Share
from pretrain_merge.config import LONGEST_SPAN
from pretrain_merge.plan import Advice, Cost, Plan, Question
from pretrain_merge.plan.costs import COPIES_IN_TRAINING, STEP
from pretrain_merge.plan.times import Move
from pretrain_merge.records.tables import require_rich
from pretrain_merge.stores.budget import DEVICE_SHARE, HOST_SHARE

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, str, str]
_PREFIXES = ("", "K", "M", "B", "T")
_BYTES = ("B", "KB", "MB", "GB", "TB", "PB")


def plan_table(question: Question, plan: Plan, advice: Advice, *, restart_points: int = 0) -> "Table":
    """One row per figure: what it is, how much, and how it was computed. Bytes are decimal: a GB is 10^9 of them.

    Args:
        question: What the plan was made from.
        plan: What was computed.
        advice: The paper's interval and window.
        restart_points: Of `SpikeRecovery`, beside the window.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    require_rich()
    from rich.box import SIMPLE
    from rich.padding import Padding
    from rich.table import Table

    table = Table(box=SIMPLE, title=_title(question), title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("what")
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_column("from")
    sections: Sequence[tuple[str, Iterator[Row]]] = (
        ("interval and window", _cadence(question, plan, advice)),
        ("memory of the fullest rank", _memory(question, plan, restart_points)),
        ("where the window fits, per rank", _places(question, plan)),
        ("share of the training time", _times(question, plan)),
        ("files", _files(question, plan)),
    )
    for title, rows in sections:
        table.add_row(f"[bold]{title}[/]")
        for what, how_much, origin in rows:
            # padded, not indented by spaces: a name that goes on in a second line stays in its section
            table.add_row(Padding(what, (0, 0, 0, 2)), how_much, origin)
        table.add_section()
    return table


def _title(question: Question) -> str:
    model, layout = question.model, question.layout
    experts = f", {_count(model.activated)} activated" if model.has_experts else ""
    sizes = {"shard": layout.shard, "replicate": layout.replicate, "tensor": layout.tensor}
    ways = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    ranks = f"{layout.num_ranks:,} ranks ({ways})" if ways else "one rank"
    return f"{model.source}: {_count(model.total)} parameters{experts}, on {ranks}"


def _cadence(question: Question, plan: Plan, advice: Advice) -> Iterator[Row]:
    yield "the paper's interval", f"{_count(advice.interval)} tokens", advice.how
    yield "the paper's window", str(advice.window), "its nearest row"
    intervals = question.merging.span_in_intervals
    grows = Share.spanning(LONGEST_SPAN, intervals, "tokens")
    spans = f"a window always spans {grows.percent * intervals:g}% of it"
    yield "or a share of the run", f"{grows.percent:g}% of tokens", spans
    every = question.merging.every
    steps = f"{plan.steps_between_snapshots:,.0f} steps of {_count(question.training.tokens_per_step)} tokens"
    yield "interval here", f"{_count(every.amount)} {every.unit}", steps
    yield "merges", f"every {plan.steps_between_merges:,.0f} steps", _views(question)
    training, merging = question.training, question.merging
    if training.total_tokens is not None:
        steps_of_run = training.total_tokens / training.tokens_per_step
        of_run = f"{_count(training.total_tokens)} tokens"
        yield "snapshots in the run", f"{int(steps_of_run / plan.steps_between_snapshots):,}", f"{of_run} / interval"
        # the first merge needs a second snapshot
        yield "merges in the run", f"{max(0, int(steps_of_run / plan.steps_between_merges) - 1):,}", f"of {of_run}"
        share = merging.span_in_intervals * plan.steps_between_snapshots / steps_of_run
        whole = f"of the run; a view takes the newest within {LONGEST_SPAN:.0%} of the tokens so far"
        yield "a window spans", f"{share:.1%}", whole


def _memory(question: Question, plan: Plan, restart_points: int) -> Iterator[Row]:
    merging, layout = question.merging, question.layout
    # replicas hold the same, so they divide nothing
    divided = layout.shard * layout.tensor
    held = f"{_count(question.model.total)} / {divided:,}, rows rounded up" if divided > 1 else "all"
    yield "parameters", f"{plan.elements:,}", held
    yield "snapshot", _size(plan.slot_bytes), f"parameters × {merging.slot_itemsize} bytes"
    yield "window", _size(plan.window_bytes), f"{merging.window} × {_size(plan.slot_bytes)}"
    # P31: the newest slot stands for raw only where its bits are equal, which a smaller dtype rules out
    aside = f"parameters × {merging.itemsize} bytes" if plan.scratch_bytes else "none: the newest snapshot is raw"
    yield "copy of raw in an evaluation", _size(plan.scratch_bytes), aside
    summed = f"parameters × {merging.accumulator_itemsize} bytes" if plan.accumulator_bytes else "none: average is last"
    yield "open block", _size(plan.accumulator_bytes), summed
    buffers = plan.staging_device_bytes + plan.staging_host_bytes
    yield "buffers", _size(buffers), f"for slots on their way; store is {plan.store}"
    if restart_points:
        size = restart_points * plan.elements * merging.itemsize
        yield "restart points", _size(size), f"{restart_points} × parameters × {merging.itemsize} bytes, on the host"


def _places(question: Question, plan: Plan) -> Iterator[Row]:
    hardware, merging = question.hardware, question.merging
    training = f"less {COPIES_IN_TRAINING} × parameters × {merging.itemsize} bytes of training"
    origins = {
        "device": f"of {_size(hardware.device_bytes)} {training}" if hardware.device_bytes else "host memory",
        "host": "a rank's part of its host" + ("" if hardware.device_bytes else f", {training}"),
        "disk": f"{merging.window} slots and one being written",
    }
    for name, place in plan.places.items():
        verdict = "[green]fits[/]" if place.fits else "[red]too large[/]"
        much = f"{_size(place.needed)} of {_size(place.free)}"
        yield {"host": "host memory"}.get(name, name), much, f"{verdict}; {origins[name]}"
    rule = f"auto: up to {DEVICE_SHARE:.0%} of what is free on the device, {HOST_SHARE:.0%} on the host, else disk"
    yield "store", plan.store, rule if merging.store == "auto" else "as given"


def _times(question: Question, plan: Plan) -> Iterator[Row]:
    training, hardware = question.training, question.hardware
    estimate = (
        f"{STEP} × {_count(question.model.activated)} × {_count(training.tokens_per_step)} tokens / "
        f"({question.layout.num_ranks:,} × {hardware.flops / 1e12:,.0f} TFLOPS × {training.utilisation:.0%})"
    )
    yield "a step of training", _duration(plan.step_seconds), estimate if training.step_seconds is None else "as given"
    yield from ((name, _share(cost.share), _origin(cost)) for name, cost in plan.costs.items())
    yield "together", _share(plan.share), ""


def _origin(cost: Cost) -> str:
    parts = [f"{_moved(move)} = {_duration(move.seconds)}" for move in cost.moves]
    # what the run waits for besides is what was not done beside it in time
    late = cost.seconds - sum(move.seconds for move in cost.moves)
    beside = [f"{_duration(move.seconds)} beside the run ({_moved(move)})" for move in cost.beside]
    waiting = [f"of which it waits for {_duration(late)}"] if late > 0 else []
    return "; ".join([" + ".join(parts) + f", every {_duration(cost.period)}", *beside, *waiting])


def _moved(move: Move) -> str:
    if move.through == "model":
        return f"{_count(move.amount)} tokens / {_count(move.rate)} tokens/s"
    if move.through in ("checks", "rounding"):
        return f"{_count(move.amount)} elements / {_count(move.rate)}/s of {move.through}"
    return f"{_size(move.amount)} / {_size(move.rate)}/s of {move.through}"


def _files(question: Question, plan: Plan) -> Iterator[Row]:
    merging, total = question.merging, _count(question.model.total)
    sharing = min(question.hardware.ranks_per_host, question.layout.num_ranks)
    slots = f"{sharing} ranks × {merging.window + 1} × {_size(plan.slot_bytes)}"
    where = slots if plan.slot_file_bytes_per_host else f"none: store is {plan.store}"
    yield "slot files on a host", _size(plan.slot_file_bytes_per_host), where
    saved = f"{merging.window} × {total} × {merging.slot_itemsize} bytes, each shard once"
    yield "a window saved to resume from", _size(plan.saved_window_bytes), saved
    if question.training.total_tokens is not None:
        number = int(question.training.total_tokens / question.training.tokens_per_step / plan.steps_between_snapshots)
        # snapshots are files of their own, which checkpoints share
        most = max(number, merging.window) * plan.saved_window_bytes // merging.window
        yield "with save_top_k=-1, at most", _size(most), f"{number:,} snapshots in the run; keep_windows bounds it"
    yield "a merged model", _size(plan.merged_model_bytes), f"{total} × {merging.itemsize} bytes"


def _views(question: Question) -> str:
    number = len(question.merging.views)
    return f"{number} view{'s' if number > 1 else ''}, and raw"


def _count(number: float) -> str:
    """Three digits and a prefix.

    >>> _count(7_000_000_000), _count(4_194_304), _count(12)
    ('7B', '4.19M', '12')
    """
    return _scaled(number, 1000.0, _PREFIXES, "")


def _size(num_bytes: float) -> str:
    """Decimal.

    >>> _size(35e9), _size(0)
    ('35 GB', '0 B')
    """
    return _scaled(num_bytes, 1000.0, _BYTES, " ")


def _scaled(number: float, base: float, units: Sequence[str], space: str) -> str:
    index = 0
    # of the rounded number: 999.9 would be shown as 1e+03
    while float(f"{number:.3g}") >= base and index < len(units) - 1:
        number, index = number / base, index + 1
    return f"{number:.3g}{space if units[index] else ''}{units[index]}"


def _duration(seconds: float) -> str:
    """In the largest unit that gives a whole one.

    >>> _duration(0.0012), _duration(53.1), _duration(172_800)
    ('1.2 ms', '53.1 s', '48 h')
    """
    # 90 s are read more easily than 1.5 min
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size * (2 if unit == "min" else 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _share(share: float) -> str:
    """A percentage of two digits.

    >>> _share(0.00051), _share(0.0), _share(1e-9), _share(13.04)
    ('0.051%', '0%', '<0.0001%', '1,304%')
    """
    if share >= 1:
        return f"{share * 100:,.0f}%"
    return "0%" if share == 0 else "<0.0001%" if share < 1e-6 else f"{share * 100:.2g}%"
