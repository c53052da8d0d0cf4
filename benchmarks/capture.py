"""What a snapshot costs, in copies of the model: the copy, the finite check, the samples and the mean of a block.

    python -m benchmarks.capture [--json FILE] [--quick] [--dtypes float32 bfloat16] [--device cuda]

The unit is one `copy_` of every tensor of a 110M Llama into memory that is already there. A capture into a new slot
also waits for the operating system to hand out pages; that happens once per slot.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Action, chosen_device, interleave, machine, new_parser, show, write_json
from benchmarks.parameters import llama_tensors
from pretrain_merge import parameters
from pretrain_merge.stores.device import DeviceStore
from pretrain_merge.window.block_mean import BlockMean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = {
    "what": "what",
    "seconds": "seconds",
    "ratio to copy": "ratio_to_copy",
    "lowest": "ratio_lowest",
    "highest": "ratio_highest",
}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print tables, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = chosen_device(options)
    print(f"{machine(device)}; torch {torch.__version__}")
    rows = [row for name in options.dtypes for row in _measure(name, device, options)]
    write_json(options.json, rows)
    return rows


def _measure(dtype: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    live = llama_tensors(DTYPES[dtype], device, shrink=32 if options.quick else 1)
    tensors = list(live.values())
    elements = sum(tensor.numel() for tensor in tensors)
    copied = [torch.empty_like(tensor) for tensor in tensors]
    label = f"{dtype}, {len(tensors)} tensors, {elements / 2**20:.1f} Mi elements"
    rounds = 3 if options.quick else options.rounds
    timings = interleave(_candidates(live), _copy_all(copied, tensors), rounds=rounds, device=device, label=label)
    rows = [
        {
            "what": name,
            "dtype": dtype,
            "seconds": timing.median,
            "ratio_to_copy": timing.ratio,
            "ratio_lowest": min(timing.ratios),
            "ratio_highest": max(timing.ratios),
            "elements": elements,
            "tensors": len(tensors),
            "rounds": rounds,
            "machine": machine(device),
            "torch": torch.__version__,
        }
        for name, timing in timings.items()
    ]
    show(label, rows, COLUMNS)
    return rows


def _candidates(live: dict[str, Tensor]) -> dict[str, Action]:
    tensors = list(live.values())
    dtypes = [tensor.dtype for tensor in tensors]
    store, narrow_store = DeviceStore(), DeviceStore()
    candidates: dict[str, Action] = {
        "capture": lambda: store.write(0, live, dtypes),
        "capture with finite check": lambda: (parameters.all_finite(tensors), store.write(0, live, dtypes)),
        "finite check": lambda: parameters.all_finite(tensors),
        "finite check by isfinite": lambda: all(bool(tensor.isfinite().all()) for tensor in tensors),
        "finite check by norm": lambda: _norm_is_finite(tensors),
        "block: first sample": _first_sample(live),
        "block: next sample": _next_sample(live),
        "block: check, mean and capture": _end_of_block(live),
    }
    if dtypes[0] == torch.float32:
        narrow = [torch.bfloat16] * len(tensors)
        candidates["capture as bfloat16"] = lambda: narrow_store.write(0, live, narrow)
    return candidates


def _first_sample(live: dict[str, Tensor]) -> Action:
    block = BlockMean(1)

    def sample() -> None:
        block.restart()
        block.sample(1, lambda: live)

    return sample


def _next_sample(live: dict[str, Tensor]) -> Action:
    block = BlockMean(1)
    block.sample(1, lambda: live)
    return lambda: block.sample(2, lambda: live)


def _end_of_block(live: dict[str, Tensor]) -> Action:
    block, store = BlockMean(1), DeviceStore()
    block.sample(1, lambda: live)
    dtypes = [tensor.dtype for tensor in live.values()]

    def end() -> None:
        parameters.all_finite(block.sums)
        store.write(0, dict(zip(live, block.mean(), strict=True)), dtypes)

    return end


def _norm_is_finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).isfinite().all())


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("capture", __doc__)
    parser.add_argument("--quick", action="store_true", help="a thousandth of the model, three rounds")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    return parser


if __name__ == "__main__":
    main()
