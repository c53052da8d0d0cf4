"""The shapes of a model's parameters from what its user has: a count, a Hugging Face configuration, safetensors files.

This module reads headers and configurations, never weights. It knows nothing of plans.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError
from pretrain_merge.plan import Model
from pretrain_merge.plan.shards import Shape

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)", re.IGNORECASE | re.ASCII)
_MULTIPLIERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# How configurations call the number of routed experts, and of those that work on a token.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k")
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit

Shapes = Mapping[str, Shape]


def read_model(source: str, *, activated: str | None = None) -> Model:
    """Parameters of a model.

    Args:
        source: A count ("7B"), a `config.json` or the folder that holds it, a `model.safetensors.index.json`, or a
            `.safetensors` file.
        activated: Parameters that work on each token, as a count; None: all, or as the configuration's experts say.

    Raises:
        ConfigError: The source is neither a count nor a file, or its activated parameters cannot be told.
        CheckpointError: A file cannot be read.
        MissingDependencyError: A `config.json` needs transformers, which is not installed.
    """
    path = Path(source).expanduser()
    if not path.exists():
        total = _count(source, "model")
        return _model(source, {"count": (total, 1)}, activated, {})  # a column of so many rows
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".safetensors":
        return _model(path.name, _header(path), activated, _configuration_beside(path))
    if path.name.endswith(".safetensors.index.json"):
        return _model(path.name, _shapes_of_index(path), activated, _configuration_beside(path))
    return _model(path.name, _shapes_of_configuration(path), activated, _json(path))


def _model(source: str, shapes: Shapes, activated: str | None, configuration: Mapping[str, Any]) -> Model:
    total = sum(map(math.prod, shapes.values()))
    number = _count(activated, "activated") if activated is not None else _activated(shapes, configuration)
    if not 1 <= number <= total:
        raise ConfigError(f"activated: {number} of {total} parameters. Allowed: 1 to all of them.")
    return Model(source, tuple(shapes.values()), number)


def _count(text: str, key: str) -> int:
    match = _COUNT.fullmatch(text.strip())
    amount = round(float(match[1]) * _MULTIPLIERS[match[2].upper()]) if match else 0
    if amount < 1:
        raise ConfigError(
            f"{key}: {text!r} is neither a file nor a number of parameters. Allowed: a number such as 7B or 411M"
            + (", config.json, model.safetensors.index.json, or a .safetensors file." if key == "model" else ".")
        )
    return amount


def _activated(shapes: Shapes, configuration: Mapping[str, Any]) -> int:
    """All parameters, less the routed experts that rest: each token passes `per token` of `experts`."""
    total = sum(map(math.prod, shapes.values()))
    routed = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    if not routed:
        return total
    text = configuration.get("text_config", configuration)
    experts = next((text[key] for key in _EXPERTS if isinstance(text.get(key), int)), None)
    per_token = next((text[key] for key in _PER_TOKEN if isinstance(text.get(key), int)), None)
    if not experts or not per_token:
        raise ConfigError(
            "activated: the model has routed experts, and nothing says how many of them work on a token. Give the "
            "number of activated parameters, or a config.json that has num_experts_per_tok and num_local_experts."
        )
    return total - routed + routed * int(per_token) // int(experts)


def _shapes_of_configuration(path: Path) -> Shapes:
    """Of the causal language model that transformers builds from it, on the meta device: nothing is allocated."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Counting the parameters of a config.json needs transformers, which is not installed. Run: pip install "
            "transformers, or give the number of parameters."
        ) from error
    _json(path)  # what is no JSON at all is said in our words
    try:
        configuration = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(configuration)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model: transformers builds no causal language model from {path} ({reason}). Give the number of "
            f"parameters, or its model.safetensors.index.json."
        ) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shapes_of_index(path: Path) -> Shapes:
    """Of all files that the index names; where some are missing, of the total that the index itself may hold."""
    index = _json(path)
    files = sorted({path.parent / str(name) for name in index.get("weight_map", {}).values()})
    if files and all(file.exists() for file in files):
        return {name: shape for file in files for name, shape in _header(file).items()}
    total = index.get("metadata", {}).get("total_parameters")
    if not isinstance(total, int) or total < 1:
        raise CheckpointError(
            f"{path} has no total_parameters, and not all files that it names are beside it. Put them there (headers "
            f"are read, no weights), or give the number of parameters."
        )
    return {"count": (total, 1)}


def _header(path: Path) -> Shapes:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            entries = json.loads(file.read(size))
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}). Name another file.") from error


def _configuration_beside(path: Path) -> Mapping[str, Any]:
    beside = path.with_name("config.json")
    return _json(beside) if beside.exists() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Name another file.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object. Name another file.")
    return values
