"""The command `pretrain-merge plan`: from what its user knows of a run to a table, and to JSON.

This module knows the command's options. What a model holds is found in `model_shapes`; the arithmetic is that of
`pretrain_merge.plan`; `table` shows it.
"""

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal

from pretrain_merge.cadence import Quantity, Share, parse_interval
from pretrain_merge.cli.model_shapes import read_model
from pretrain_merge.cli.results import console_beside, write_result
from pretrain_merge.config import LONGEST_SPAN, WindowConfig, build, parse_views
from pretrain_merge.errors import ConfigError
from pretrain_merge.plan import (
    HARDWARE,
    Advice,
    Layout,
    Measured,
    Merging,
    Plan,
    Question,
    Training,
    make_plan,
    used_for,
)

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def plan(
    model: str,
    *,
    gpus: int = 1,
    hardware: Literal["h100", "h200", "a100", "cpu"] = "h100",
    measured: Measured = Measured(),  # noqa: B008 - frozen
    dtype: Dtype = "float32",
    activated: str | None = None,
    shard: int | None = None,
    replicate: int = 1,
    tensor: int = 1,
    window: int = 10,
    every: str | None = None,
    merge_every: str | None = None,
    views: Sequence[str] = ("sma",),
    average: Literal["last", "block"] = "last",
    sample_every: int = 1,
    store: Literal["auto", "device", "host", "disk"] = "auto",
    slot_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    restart_points: int = 0,
    total_tokens: str | None = None,
    tokens_per_step: str = "4M",
    validation_tokens: str = "10M",
    step_seconds: float | None = None,
    utilisation: float = 0.4,
    json: Path | None = None,
) -> None:
    """What merging will cost a run: bytes per rank and where they fit, shares of the training time, files.

    Args:
        model: Number of parameters (7B), a Hugging Face config.json or its folder, a model.safetensors.index.json, or a
            .safetensors file.
        gpus: Ranks, one per device.
        hardware: What each rank has.
        measured: Figures of your own machine, in place of those of the hardware.
        dtype: Of the live parameters (float32 also under mixed precision).
        activated: Parameters that work on each token, where experts are routed (17B); default: all, or what the
            config.json says.
        shard: Ranks over which FSDP2 divides each parameter; default: all that replicate and tensor leave.
        replicate: Copies of the model; under DDP as many as ranks.
        tensor: Ranks of tensor parallelism.
        window: Snapshots kept.
        every: Distance between snapshots, as in the configuration; default: the paper's for this size.
        merge_every: Distance between merges; default: every snapshot.
        views: Named merges, as in the configuration.
        average: A snapshot is the last model of its interval, or the mean of its block.
        sample_every: With blocks: steps between the models that enter the mean.
        store: Where snapshots lie.
        slot_dtype: Dtype of snapshots where smaller than the parameters'.
        restart_points: Of SpikeRecovery, beside the window: 3 with its defaults.
        total_tokens: Tokens of the whole run (2T): also say how many snapshots and merges it makes, and what share of
            it a window spans.
        tokens_per_step: Tokens of one optimizer step, over all ranks; the default is Llama 2's (arXiv 2307.09288).
        validation_tokens: Tokens of one pass over the validation data.
        step_seconds: Seconds of one optimizer step; default: estimated from parameters, tokens and utilisation.
        utilisation: Share of the peak that training reaches; Llama 3 405B: 38 to 43% (arXiv 2407.21783, table 4).
        json: Also write all figures to this file; - is standard output.
    """
    # with rich, which comes with an extra
    from pretrain_merge.cli.plan_table import plan_table

    shapes = read_model(model, activated=activated)
    advice = used_for(shapes.activated, has_experts=shapes.has_experts)
    # what a user would paste into a configuration; `_yaml` prints it
    options = {
        "window": window,
        "every": every or _tokens_text(advice.interval),
        "merge_every": merge_every,
        "views": list(views),
        "average": average,
        "sample_every": sample_every,
        "slot_dtype": slot_dtype,
    }
    question = Question(
        shapes,
        _layout(gpus, shard, replicate, tensor),
        measured.over(HARDWARE[hardware]),
        # by the callback's own schema: a plan refuses what the run would refuse
        _merging(build(WindowConfig, options), dtype, store),
        Training(
            _tokens(tokens_per_step, "tokens_per_step"),
            _tokens(validation_tokens, "validation_tokens"),
            step_seconds,
            utilisation,
            None if total_tokens is None else _tokens(total_tokens, "total_tokens"),
        ),
    )
    made = make_plan(question)
    console = console_beside(json)
    console.print(plan_table(question, made, advice, restart_points=restart_points))
    console.print(_yaml(options | {"store": store}), markup=False, soft_wrap=True)
    if json is not None:
        write_result(json, json_format.dumps(_figures(question, made, advice), indent=1) + "\n")


def _layout(gpus: int, shard: int | None, replicate: int, tensor: int) -> Layout:
    # at least 1, so that sizes that do not fit are refused below, with all of them in the message
    layout = Layout(shard or max(1, gpus // max(1, replicate * tensor)), replicate, tensor)
    if layout.num_ranks != gpus:
        raise ConfigError(
            f"gpus: {gpus} ranks, and shard {layout.shard} × replicate {replicate} × tensor {tensor} are "
            f"{layout.num_ranks}. Allowed: sizes whose product is the number of ranks."
        )
    return layout


def _merging(config: WindowConfig, dtype: Dtype, store: str) -> Merging:
    own = _BYTES[dtype]
    return Merging(
        every=_fixed(config.every, "every"),
        merge_every=None if config.merge_every is None else _fixed(config.merge_every, "merge_every"),
        window=config.window,
        # of a view that is limited by its span: the most that it can read
        views=tuple(view.last or config.window for view in parse_views(config)),
        average=config.average,
        sample_every=config.sample_every,
        store=store,
        itemsize=own,
        # a slot is never wider than its parameter, whatever the key says
        slot_itemsize=min(own, _BYTES[config.slot_dtype]) if config.slot_dtype else own,
    )


def _fixed(value: object, key: str) -> Quantity:
    interval = parse_interval(value, key=key)
    if isinstance(interval, Share):
        raise ConfigError(
            f"{key}: {interval}, which grows with the run, and a plan is of one moment of it. Give the interval of "
            f"that moment: after 1T tokens, 1% is '10B tokens'."
        )
    return interval


def _yaml(options: Mapping[str, Any]) -> str:
    """The configuration that was planned with, to be pasted; what is at its default is left out."""
    defaults = {item.name: item for item in fields(WindowConfig)}
    lines = ["# the callback's configuration, as a YAML file"]
    # N snapshots span N - 1 intervals, N means of blocks span N
    reach = options["window"] - (options["average"] == "last")
    grows = Share.spanning(LONGEST_SPAN, reach).percent
    for key, value in options.items():
        default = defaults[key].default if defaults[key].default is not MISSING else None
        # the three that decide what a merge is are said at their defaults too
        if value != default or key in ("window", "every", "views"):
            lines.append(f"{key}: {json_format.dumps(value)}")
        if key == "every":
            lines.append(f'# every: "{grows:g}% of tokens"  # instead: it grows with the run')
    return "\n".join(lines)


def _tokens_text(number: int) -> str:
    """Whole billions as people write them.

    >>> _tokens_text(13_000_000_000)
    '13B tokens'
    """
    return f"{number // 10**9}B tokens" if number % 10**9 == 0 else f"{number} tokens"


def _tokens(text: str, key: str) -> int:
    quantity = Quantity.parse(text, key=key, minimum=0)
    # a bare number is read as steps, and means tokens here: whether steps were written, only the text says
    if quantity.unit == "samples" or "step" in text.lower():
        raise ConfigError(f"{key}: {text!r} is not a number of tokens. Allowed: a number such as 4M or 10M tokens.")
    return quantity.amount


def _figures(question: Question, plan: Plan, advice: Advice) -> dict[str, Any]:
    """Everything as plain JSON values; costs and places with what follows from them."""
    figures = asdict(plan)
    # `asdict` leaves properties out
    for name, cost in plan.costs.items():
        figures["costs"][name] |= {"seconds": cost.seconds, "share": cost.share}
    for name, place in plan.places.items():
        figures["places"][name] |= {"fits": place.fits}
    model = question.model
    return {
        "model": {"source": model.source, "parameters": model.total, "activated": model.activated},
        "layout": asdict(question.layout),
        "hardware": asdict(question.hardware),
        "merging": asdict(question.merging),
        "training": asdict(question.training),
        "paper": asdict(advice),
        "plan": figures | {"share": plan.share},
    }
