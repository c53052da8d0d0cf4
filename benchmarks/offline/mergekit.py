"""The same sums by mergekit's `linear` and in float64: where its arithmetic is exact, every bit is the same.

Weights whose sum is a power of two make each product and the division exact, so that both programs round the same
float32 sums, once. Tensors are of three dtypes in turn, as no `dtype` is asked for.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.offline.checkpoints import shapes, write_hugging_face
from pretrain_merge import merge_checkpoints

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHTS = ((1, 1), (1, 1, 2, 4), (1,) * 8)
_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def agreement(folder: Path, mergekit: str | None) -> list[dict[str, Any]]:
    """A row for each dtype.

    Args:
        folder: Where checkpoints may be written.
        mergekit: The path of `mergekit-yaml`; None: only float64 is compared with.
    """
    own: dict[torch.dtype, dict[str, Any]] = {
        dtype: {"what": f"sums in {str(dtype).removeprefix('torch.')}", "elements": 0, "other_bits": 0, "ulps": 0.0}
        for dtype in _DTYPES
    }
    for number, weights in enumerate(_WEIGHTS):
        places = _written(folder / f"weights-{number}", len(weights))
        coefficients = [weight / sum(weights) for weight in weights]
        merge_checkpoints(places, folder / f"ours-{number}", coefficients)
        found = load_file(folder / f"ours-{number}" / "model.safetensors")
        states = [load_file(place / "model.safetensors") for place in places]
        theirs = _by_mergekit(mergekit, places, weights, folder / f"theirs-{number}") if mergekit else found
        for name, value in found.items():
            row = own[value.dtype]
            row["elements"] += value.numel()
            row["other_bits"] += int((value.view(torch.uint8) != theirs[name].view(torch.uint8)).sum())
            row["ulps"] = max(row["ulps"], _error(value, [state[name] for state in states], coefficients))
    return [row | {"of_mergekit": mergekit is not None} for row in own.values()]


def _written(folder: Path, number: int) -> list[Path]:
    places = []
    for step in range(1, number + 1):
        state = {
            name: (torch.randn(shape) * 0.02).to(_DTYPES[index % len(_DTYPES)])
            for index, (name, shape) in enumerate(shapes(16))
        }
        places.append(folder / f"checkpoint-{step}")
        write_hugging_face(state, places[-1])
    return places


def _by_mergekit(command: str, places: Sequence[Path], weights: Sequence[float], out: Path) -> Mapping[str, Tensor]:
    models = [
        {"model": str(place), "parameters": {"weight": weight}} for place, weight in zip(places, weights, strict=True)
    ]
    plan = out.with_suffix(".yaml")
    plan.write_text(json.dumps({"merge_method": "linear", "models": models}))
    subprocess.run([command, str(plan), str(out), "--no-copy-tokenizer"], check=True, capture_output=True)
    return load_file(out / "model.safetensors")


def _error(value: Tensor, parts: Sequence[Tensor], coefficients: Sequence[float]) -> float:
    """The largest distance from the float64 sum, in units in the last place; rounding alone: 0.5.

    Of the result; in float32, which is the accumulator's own dtype, of the largest that it may have held before parts
    of either sign cancelled.
    """
    exact = sum(c * part.double() for c, part in zip(coefficients, parts, strict=True))
    held = sum(abs(c) * part.double().abs() for c, part in zip(coefficients, parts, strict=True))
    assert isinstance(exact, Tensor)
    assert isinstance(held, Tensor)
    _, exponent = torch.frexp(held if value.dtype is torch.float32 else value.double())
    unit = torch.ldexp(torch.ones_like(exact), exponent - 1 - _FRACTION_BITS[value.dtype])
    # below the smallest normal number units no longer shrink
    smallest = torch.finfo(value.dtype).smallest_normal * 2.0 ** -_FRACTION_BITS[value.dtype]
    return float(((value.double() - exact).abs() / unit.clamp(min=smallest)).max())
