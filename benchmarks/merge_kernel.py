"""How fast N snapshots become one: our backends, what else people use, and the memory's own speed.

    python -m benchmarks.merge_kernel [--json FILE] [--snapshots 10] [--elements 67108864] [--device cuda]

The unit is the time that `copy_` needs to move the streams that a merge must move: N reads and one write per element,
which is (N + 1) / 2 copies. A ratio of 1 is as fast as memory allows by that measure; it can be lower, because a
machine reads faster than it writes.
"""

import argparse
import gc
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, get_swa_multi_avg_fn

from benchmarks.measure import Action, Timing, chosen_device, interleave, machine, new_parser, show, write_json
from pretrain_merge.kernels.weighted_sum import Backend, weighted_sum_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = {
    "backend": "backend",
    "seconds": "seconds",
    "ratio to copy": "ratio_to_copy",
    "lowest": "ratio_lowest",
    "highest": "ratio_highest",
    "times ours": "times_ours",
}

Shapes = list[tuple[int, ...]]
Lists = list[list[Tensor]]


def llama_110m() -> Shapes:
    """Parameters of a 110M Llama: width 768, 12 layers, 32,000 tokens, the output tied to the embedding."""
    width, hidden = 768, 2048
    layer = [(width, width)] * 4 + [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(32_000, width), *layer * 12, (width,)]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print tables, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = chosen_device(options)
    print(f"{machine(device)}; torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for name in options.dtypes:
        for num_snapshots in options.snapshots:
            rows += _compare_backends(name, num_snapshots, device, options)
            gc.collect()  # closures and tensors refer to each other
            if not options.skip_model:
                rows += _compare_list_with_flat(name, num_snapshots, device, options)
                gc.collect()
    write_json(options.json, rows)
    return rows


def _compare_backends(
    dtype: str, num_snapshots: int, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Everything that can merge, on one tensor."""
    lists = _tensors([(options.elements,)], num_snapshots + 1, DTYPES[dtype], device)
    *snapshots, out = lists
    candidates = _candidates(out, snapshots, device)
    if options.only:
        candidates = {name: candidates[name] for name in options.only}
    label = f"{dtype}, N={num_snapshots}, one tensor of {options.elements / 2**20:.0f} Mi elements"
    timings = interleave(candidates, _copies(snapshots, out), rounds=options.rounds, device=device, label=label)
    rows = _rows(timings, lists, dtype, num_snapshots, device, shapes="flat")
    show(label, rows, COLUMNS)
    return rows


def _compare_list_with_flat(
    dtype: str, num_snapshots: int, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A real model's list of tensors against one tensor of the same size: what the list costs."""
    model = _tensors(llama_110m(), num_snapshots + 1, DTYPES[dtype], device)
    flat = _tensors([(sum(tensor.numel() for tensor in model[0]),)], num_snapshots + 1, DTYPES[dtype], device)
    coefficients = [1 / num_snapshots] * num_snapshots
    candidates: dict[str, Action] = {
        "ours, one flat tensor": lambda: weighted_sum_(flat[-1], flat[:-1], coefficients),
        "ours, list of tensors": lambda: weighted_sum_(model[-1], model[:-1], coefficients),
    }
    label = (
        f"{dtype}, N={num_snapshots}, Llama 110M: {len(model[0])} tensors, {flat[0][0].numel() / 2**20:.0f} Mi elements"
    )
    timings = interleave(candidates, _copies(flat[:-1], flat[-1]), rounds=options.rounds, device=device, label=label)
    rows = _rows(timings, model, dtype, num_snapshots, device, shapes="llama-110m")
    rows[0]["tensors"] = 1
    show(label, rows, COLUMNS | {"times flat": "times_ours"})
    return rows


def _candidates(out: list[Tensor], snapshots: Lists, device: torch.device) -> dict[str, Action]:
    """The first one is ours; all others are compared with it."""
    coefficients = [1 / len(snapshots)] * len(snapshots)

    def ours(backend: Backend, *, spread: bool = False) -> Action:
        return lambda: weighted_sum_(out, snapshots, coefficients, backend=backend, spread=spread)

    compiled: Backend = "cuda" if device.type == "cuda" else "cpu"
    lightning = EMAWeightAveraging()
    return {
        f"ours: {compiled}": ours(compiled),
        f"ours: {compiled}, with spread": ours(compiled, spread=True),
        f"ours: {compiled}, into the newest snapshot": lambda: weighted_sum_(
            snapshots[-1], snapshots, coefficients, backend=compiled
        ),
        "ours: reference": ours("reference"),
        "foreach chain, float32 sums": _foreach_chain(out, snapshots, coefficients),
        "swa_utils, multi_avg_fn": _averaged_model(snapshots, multi_avg_fn=get_swa_multi_avg_fn()),  # type: ignore[no-untyped-call]
        "swa_utils, avg_fn": _averaged_model(snapshots, avg_fn=get_swa_avg_fn()),  # type: ignore[no-untyped-call]
        "Lightning EMAWeightAveraging": _averaged_model(
            snapshots, use_buffers=lightning._use_buffers, **lightning._kwargs
        ),
        "stack, as mergekit": _stack(out, snapshots, coefficients),
    }


@torch.no_grad()
def _chain_step(total: list[Tensor], snapshots: Lists, coefficients: list[float]) -> None:
    torch._foreach_copy_(total, snapshots[0])
    torch._foreach_mul_(total, coefficients[0])
    for snapshot, coefficient in zip(snapshots[1:], coefficients[1:], strict=True):
        torch._foreach_add_(total, snapshot, alpha=coefficient)


def _foreach_chain(out: list[Tensor], snapshots: Lists, coefficients: list[float]) -> Action:
    """One multi-tensor operation per snapshot; 16-bit weights need a float32 copy of the model for the sums."""
    if out[0].dtype is torch.float32:
        return lambda: _chain_step(out, snapshots, coefficients)
    total = [tensor.float() for tensor in out]

    def chain() -> None:
        _chain_step(total, snapshots, coefficients)
        torch._foreach_copy_(out, total)

    return chain


def _averaged_model(snapshots: Lists, **options: Any) -> Action:
    """Torch's `AveragedModel`, fed one snapshot after another, as its users and Lightning do."""
    modules = [nn.ParameterList([nn.Parameter(tensor) for tensor in snapshot]) for snapshot in snapshots]
    averaged = AveragedModel(modules[0], **options)

    def update() -> None:
        averaged.n_averaged.zero_()
        for module in modules:
            averaged.update_parameters(module)

    return update


def _stack(out: list[Tensor], snapshots: Lists, coefficients: list[float]) -> Action:
    """Stack, multiply and sum in the weights' own dtype, tensor by tensor: what mergekit's `linear` method does."""

    def merge() -> None:
        for target, *sources in zip(out, *snapshots, strict=True):
            stacked = torch.stack(sources)
            weights = torch.tensor(coefficients, dtype=stacked.dtype, device=stacked.device)
            weights = weights.view(-1, *[1] * target.dim())
            target.copy_((weights * stacked).sum(dim=0) / weights.sum(dim=0))

    return merge


def _copies(snapshots: Lists, scratch: list[Tensor]) -> Action:
    def copy() -> None:
        for target, source in zip(scratch, snapshots[0], strict=True):
            target.copy_(source)

    return copy


def _tensors(shapes: Shapes, num_lists: int, dtype: torch.dtype, device: torch.device) -> Lists:
    # Random weights, not zeros: pages that were never written would all be one and the same page of zeros.
    return [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(num_lists)]


def _rows(
    timings: dict[str, Timing], lists: Lists, dtype: str, num_snapshots: int, device: torch.device, *, shapes: str
) -> list[dict[str, Any]]:
    copies = (num_snapshots + 1) / 2  # of one read and one write each
    first = next(iter(timings.values()))
    return [
        {
            "backend": name,
            "dtype": dtype,
            "n": num_snapshots,
            "seconds": timing.median,
            "ratio_to_copy": timing.ratio / copies,
            "ratio_lowest": min(timing.ratios) / copies,
            "ratio_highest": max(timing.ratios) / copies,
            "times_ours": timing.times_slower_than(first),
            "shapes": shapes,
            "elements": sum(tensor.numel() for tensor in lists[0]),
            "tensors": len(lists[0]),
            "rounds": len(timing.seconds),
            "machine": machine(device),
            "torch": torch.__version__,
        }
        for name, timing in timings.items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("merge_kernel", __doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--snapshots", nargs="+", type=int, default=[10], metavar="N")
    parser.add_argument("--elements", type=int, default=1 << 26, help="of the one tensor (default: 64 Mi)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="BACKEND", help="names as in the table, ours first")
    parser.add_argument("--skip-model", action="store_true", help="leave out the model's list of tensors")
    return parser


if __name__ == "__main__":
    main()
