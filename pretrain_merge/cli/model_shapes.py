"""The shapes of a model's parameters from what its user has: a count, a Hugging Face configuration, safetensors files.

This module reads headers and configurations, never weights. It knows nothing of plans.
"""

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError, PretrainMergeError
from pretrain_merge.files import untrusted
from pretrain_merge.plan import Model
from pretrain_merge.plan.shards import Shape

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)", re.IGNORECASE | re.ASCII)
_MULTIPLIERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# How configurations call the number of routed experts, and of those that work on a token.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k")
_MOST_PARAMETERS = 10**18
_LONGEST_COUNT = 40  # characters
_LARGEST_NUMBER = 2**48  # of a size; products of a few stay numbers that a plan can be made of
_MOST_PARTS = (  # by what a key says; a layer takes some milliseconds to build
    (re.compile("layer|depth|block|stage|stack"), 2_000),
    (re.compile("expert|head|codebook"), 20_000),
)
# a size makes tensors larger, which costs nothing on the meta device; a number of parts costs time
_IS_SIZE = re.compile("size|len|dim|pos|max|token")
_MOST_MODULES = 100_000  # of all kinds; the largest public model has 60,000

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
    path = Path(source)
    if not os.path.exists(path):  # not `path.exists()`, which raises for a name that is too long
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
    if total > _MOST_PARAMETERS:
        raise ConfigError(f"model: {source} has {total:.3g} parameters. Allowed: up to {_MOST_PARAMETERS:.0e}.")
    number = _count(activated, "activated") if activated is not None else _activated(shapes, configuration)
    if not 1 <= number <= total:
        raise ConfigError(f"activated: {number} of {total} parameters. Allowed: 1 to all of them.")
    return Model(source, tuple(shapes.values()), number)


def _count(text: str, key: str) -> int:
    match = _COUNT.fullmatch(text.strip()) if len(text) <= _LONGEST_COUNT else None
    # rounded: 1.3B is not a whole number of floats
    amount = round(float(match[1]) * _MULTIPLIERS[match[2].upper()]) if match else 0
    if not 1 <= amount <= _MOST_PARAMETERS:
        raise ConfigError(
            f"{key}: {text[:80]!r} is neither a file nor a number of parameters. Allowed: a number such as 7B or 411M, "
            f"up to {_MOST_PARAMETERS:.0e}"
            + (", config.json, model.safetensors.index.json, or a .safetensors file." if key == "model" else ".")
        )
    return amount


def _activated(shapes: Shapes, configuration: Mapping[str, Any]) -> int:
    """All parameters, less the routed experts that rest: each token passes `per token` of `experts`."""
    total = sum(map(math.prod, shapes.values()))
    routed = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name)
    if not routed:
        return total
    # of a model that sees and reads, the experts are in the part that reads
    text = configuration.get("text_config", configuration)
    text = text if isinstance(text, dict) else configuration
    experts = next((text[key] for key in _EXPERTS if isinstance(text.get(key), int)), None)
    per_token = next((text[key] for key in _PER_TOKEN if isinstance(text.get(key), int)), None)
    if not experts or not per_token:
        raise ConfigError(
            "activated: the model has routed experts, and nothing says how many of them work on a token. Give the "
            "number of activated parameters, or a config.json that has num_experts_per_tok and num_local_experts."
        )
    # an integer division: a model has whole parameters
    return total - routed + routed * int(per_token) // int(experts)


def _shapes_of_configuration(path: Path) -> Shapes:
    """Of the causal language model that transformers builds from it, on the meta device: nothing is allocated."""
    _refuse_endless(_json(path), path)
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Counting the parameters of a config.json needs transformers, which is not installed. Run: pip install "
            "transformers, or give the number of parameters."
        ) from error
    try:
        # no code and no weights that the file may name elsewhere
        configuration = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"), _limited_to(_MOST_MODULES, path):
            model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                configuration, trust_remote_code=False, attn_implementation="eager"
            )
    except PretrainMergeError:
        raise
    except Exception as error:  # whatever a class does with values that make no sense
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model: transformers builds no causal language model from {path} ({reason}). Give the number of "
            f"parameters, or its model.safetensors.index.json."
        ) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _refuse_endless(values: object, path: Path, key: str = "") -> None:
    """Refuse a number of parts that no model has, before a class of transformers makes a list of so many."""
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_endless(value, path, name)
    elif isinstance(values, list):
        for value in values:
            _refuse_endless(value, path, key)
    elif isinstance(values, int) and values > _most_of(key):
        raise ConfigError(
            f"model: {key} is {values:.3g} in {path}, and no model has as many. Correct it, or give the number of "
            f"parameters."
        )


def _most_of(key: str) -> int:
    kinds = () if _IS_SIZE.search(key) else _MOST_PARTS
    return next((most for pattern, most in kinds if pattern.search(key)), _LARGEST_NUMBER)


@contextmanager
def _limited_to(most: int, path: Path) -> Iterator[None]:
    """Break off a model that grows without end, whatever key of the configuration it is that says so."""
    from torch.nn.modules.module import register_module_module_registration_hook

    numbers = count(1)

    def registered(*_: object) -> None:
        if next(numbers) > most:
            raise ConfigError(
                f"model: {path} is of a model of more than {most:,} modules. Give the number of parameters, or its "
                f"model.safetensors.index.json."
            )

    # a hook of torch for every module of the process; the block is short, and takes it away
    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def _shapes_of_index(path: Path) -> Shapes:
    """Of all files that the index names; where some are missing, of the total that the index itself may hold."""
    index = _json(path)
    named, metadata = index.get("weight_map", {}), index.get("metadata", {})
    if not isinstance(named, dict) or not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is not an index of safetensors files. Name another file.")
    names = sorted(set(map(str, named.values())))
    # a downloaded index could name any file of this machine
    if elsewhere := next((name for name in names if Path(name).name != name), None):
        raise CheckpointError(f"{path} names a file that is not beside it: {elsewhere[:80]!r}. Name another file.")
    files = [path.with_name(name) for name in names]
    # some of the files would give a smaller model without a word
    if files and all(map(os.path.exists, files)):
        return {name: shape for file in files for name, shape in _header(file).items()}
    total = metadata.get("total_parameters")
    if type(total) is not int or total < 1:
        raise CheckpointError(
            f"{path} has no total_parameters, and not all files that it names are beside it. Put them there (headers "
            f"are read, no weights), or give the number of parameters."
        )
    return {"count": (total, 1)}


def _header(path: Path) -> Shapes:
    try:
        with untrusted.opened(path) as file:
            (size,) = struct.unpack("<Q", file.read(8))
            # the file says how much to read; a crafted one says all there is
            if size > untrusted.MOST_BYTES:
                raise ValueError(f"a header of {size} bytes")
            entries = untrusted.parse_json(file.read(size))
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
        if not all(type(size) is int and 0 <= size < _LARGEST_NUMBER for shape in shapes.values() for size in shape):
            raise ValueError("a shape is not made of sizes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}). Name another file.") from error
    return shapes


def _configuration_beside(path: Path) -> Mapping[str, Any]:
    beside = path.with_name("config.json")
    # without it a dense model can still be counted
    return _json(beside) if beside.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Name another file.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. Name another file.")
    return values
