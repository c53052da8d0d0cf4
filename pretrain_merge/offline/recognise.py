"""Which kind of checkpoint lies at a place, and at which step it was saved.

This module knows names of files and folders. Each format has a module of its own.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain_merge.errors import CheckpointError
from pretrain_merge.merged_models.provenance import PROVENANCE, without_checksum
from pretrain_merge.offline import dcp_format, safetensors_format, torch_format
from pretrain_merge.offline.doubles import without_doubles
from pretrain_merge.offline.files import is_remote, join, list_folder, matching, size_of
from pretrain_merge.offline.tensors import Source
from pretrain_merge.tensor_names import plain_name

_TORCH_SUFFIXES = (".ckpt", ".pt", ".bin", ".pth", ".pth.tar")
_DCP_METADATA = ".metadata"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_WINDOW = re.compile(r"snapshot-([0-9]{8,20})-[0-9a-f]{8}\.(safetensors|sharded)")
_OPEN_BLOCK = re.compile(r"block-[0-9]{8,20}-[0-9a-f]{8}\.(safetensors|sharded)")
# a whole number and what may follow it: step1.5k or 3B tokens say no step that could be relied on
_NUMBER = r"([0-9]+)([kKM]?)(?![0-9A-Za-z]|\.[0-9])"
_THOUSANDS = {"": 1, "k": 1_000, "K": 1_000, "M": 1_000_000}
# step=1000, step-1000, step_1000, step1000, global_step1000, step5k; Hugging Face's checkpoint-1000
_STEP = re.compile(r"(?:^|[^A-Za-z])(?:(?i:global_)?(?i:steps?|checkpoint|iter))[-=_]?" + _NUMBER)
_OURS = re.compile(r"^[a-z]+-([0-9]{8,20})()-")  # our own snapshot-00001000-0123abcd
_COMPANIONS = re.compile(
    r"(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template.*)"
    r"\.(json|txt|model|jinja)|merges\.txt"
)


def find(places: Sequence[str | Path]) -> list[Source]:
    """Open every checkpoint that is named; a folder of checkpoints stands for all of them.

    Raises:
        CheckpointError: A place holds no checkpoint, or one that cannot be read.
    """
    return [source for place in places for source in _sources(str(place))]


def find_one(place: str | Path) -> Source:
    """Open a place that is one checkpoint.

    Raises:
        CheckpointError: It holds none, or several.
    """
    found = find([place])
    if len(found) != 1:
        raise CheckpointError(f"{place} holds {len(found)} checkpoints, and one is needed. Name one of them.")
    return found[0]


def step_in_name(place: str) -> int | None:
    """The step that a path names: in its last part, else in the one before.

    >>> step_in_name("run/epoch=0-step=1000-v1.ckpt"), step_in_name("run/checkpoint-500/model.safetensors")
    (1000, 500)
    >>> step_in_name("run/step5k.pt"), step_in_name("run/ckpt-1.5B-tokens.pt")
    (5000, None)
    """
    parts = place.rstrip("/").split("/")
    # 'checkpoint-500/model.safetensors': the folder has the step, unless the file has one
    for part in reversed(parts[-2:]):
        if found := _STEP.findall(part) or _OURS.findall(part):
            return _counted(*found[-1])
    # 'ckpt_0500.pt' has one number, which can only be that; of several, as in dates, none is certain
    stem = re.sub(r"(\.[A-Za-z]+)+$", "", parts[-1])
    found = re.findall(_NUMBER, stem)
    return _counted(*found[0]) if found and len(re.findall(r"[0-9]+", stem)) == 1 else None


def _counted(number: str, thousands: str) -> int:
    return int(number) * _THOUSANDS[thousands]


def _sources(place: str) -> list[Source]:
    names = list_folder(place)
    if names is None:
        if size_of(place) is None:
            # a name may hold a bracket, so what is there goes before what matches; shells leave quoted patterns to us
            if found := matching(place):
                return [source for name in found for source in _sources(name)]
            raise CheckpointError(
                f"{place} is not there. Name a checkpoint: a file, a folder of one or of several, or a pattern of "
                f"these ('run/*.ckpt')."
            )
        return [_with_step(_file(place))]
    # a folder that is a checkpoint may hold others (Trainer's checkpoint-500 inside of the final model's)
    if (source := _folder(place, names)) is not None:
        return [_with_step(source)]
    inner = [source for name in names for source in _member(join(place, name))]
    if not inner:
        # a run's folder has them further in: checkpoints/, lightning_logs/version_0/checkpoints/
        further = _further_in(place)
        if further is not None:
            raise CheckpointError(f"{place} holds no checkpoint, and {further} does. Name that folder.")
        raise CheckpointError(
            f"{place} holds no checkpoint. Allowed: .ckpt, .pt, .bin and .safetensors files, folders of Hugging Face, "
            f"of torch.distributed.checkpoint or of this package (window/, merged/step-…), and a folder of those."
        )
    return without_doubles(inner)


def _member(place: str) -> list[Source]:
    """What a folder of checkpoints has: one checkpoint, or something else."""
    name = place.rpartition("/")[2]
    if name.startswith(".") or _OPEN_BLOCK.fullmatch(name):  # what a killed process left; half a snapshot of a window
        return []
    names = list_folder(place)
    if names is None:
        return [_with_step(_file(place))] if name.endswith((*_TORCH_SUFFIXES, ".safetensors")) else []
    source = _folder(place, names)
    return [] if source is None else [_with_step(source)]


def _further_in(place: str, depth: int = 3) -> str | None:
    """A folder below with a file or folder that is named as checkpoints are; None: there is none."""
    names = list_folder(place) or []
    if any(name.endswith((*_TORCH_SUFFIXES, ".safetensors")) or name == _DCP_METADATA for name in names):
        return place
    below = (join(place, name) for name in names if depth and not name.startswith("."))
    return next((found for folder in below if (found := _further_in(folder, depth - 1)) is not None), None)


def _file(place: str) -> Source:
    if place.endswith(".safetensors"):
        return safetensors_format.open_files(place, [place])
    if place.endswith(_TORCH_SUFFIXES):
        return torch_format.open_file(place)
    raise CheckpointError(
        f"{place} is not a checkpoint that can be read by its name. Allowed: {', '.join(_TORCH_SUFFIXES)} and "
        f".safetensors files, and folders."
    )


def _folder(place: str, names: Sequence[str]) -> Source | None:
    """The one checkpoint that a folder is; None where it is something else."""
    if _DCP_METADATA in names:
        return dcp_format.open_folder(place, join(place, _DCP_METADATA))
    companions = tuple(join(place, name) for name in names if _COMPANIONS.fullmatch(name))
    options: dict[str, Any] = {"kind": "safetensors", "companions": companions}
    if PROVENANCE in names:
        options |= {"kind": "merged", "about": _provenance(place)}
        options["step"] = options["about"].get("step")
        options["ties"] = options["about"].get("ties") or {}
    tensor_files = [name for name in names if name.endswith(".safetensors")]
    # an index goes first: a stray model.safetensors beside shards is an older, single save
    for index in (name for name in names if name.endswith(safetensors_format.INDEX_SUFFIX)):
        return safetensors_format.open_files(place, safetensors_format.indexed_files(place, index), **options)
    if place.endswith(".sharded"):
        return safetensors_format.open_files(place, [join(place, name) for name in tensor_files], kind="window")
    if "model.safetensors" in names:
        return safetensors_format.open_files(place, [join(place, "model.safetensors")], **options)
    if _TORCH_INDEX in names:
        return _sharded_torch(place, companions)
    # a folder for each checkpoint, which has optimizer states in a file of their own (OLMo's)
    models = [name for name in names if name.startswith("model") and name.endswith(_TORCH_SUFFIXES)]
    for name in ("pytorch_model.bin", *(models if len(models) == 1 else ())):
        if name in names:
            return replace(torch_format.open_file(join(place, name)), place=place, companions=companions)
    if "config.json" in names and len(tensor_files) == 1:
        return safetensors_format.open_files(place, [join(place, tensor_files[0])], **options)
    return None


def _sharded_torch(place: str, companions: tuple[str, ...]) -> Source:
    parts = [torch_format.open_file(path) for path in safetensors_format.indexed_files(place, _TORCH_INDEX)]
    # a name in two parts would be read from whichever comes last
    owner = {name: part for part in parts for name in (*part.tensors, *part.ties)}
    tensors = {name: kind for part in parts for name, kind in part.tensors.items()}
    if len(owner) != sum(len(part.tensors) + len(part.ties) for part in parts):
        raise CheckpointError(f"{place} has a tensor in two files. Copy the folder again.")
    files = tuple(file for part in parts for file in part.files)
    ties = {alias: name for part in parts for alias, name in part.ties.items()}
    return Source(place, "torch", tensors, lambda name: owner[name].locate(name), files, ties, companions=companions)


def _provenance(place: str) -> dict[str, Any]:
    path = join(place, PROVENANCE)
    try:
        about = safetensors_format.read_json(path)
        if not isinstance(about, dict) or not isinstance(about.get("ties") or {}, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy the folder again.") from error
    return without_checksum(about, path)


def _with_step(source: Source) -> Source:
    """What the content says, else what the name does."""
    name = source.place if is_remote(source.place) else str(Path(source.place).absolute())
    step = source.step if type(source.step) is int else step_in_name(name)
    source = _with_plain_names(source)
    # a snapshot's name is ours and is its identity; the content has no step
    if window := _WINDOW.fullmatch(name.rpartition("/")[2]):
        return replace(source, step=int(window[1]), format="window")
    return replace(source, step=step)


def _with_plain_names(source: Source) -> Source:
    """Names that a run has whether it was compiled or not, so that both can be merged and loaded."""
    # unless that gives two tensors one name
    own = {plain_name(name): name for name in source.tensors}
    if all(plain == name for plain, name in own.items()) or len(own) < len(source.tensors):
        return source
    return replace(
        source,
        tensors={plain: source.tensors[name] for plain, name in own.items()},
        ties={plain_name(alias): plain_name(name) for alias, name in source.ties.items()},
        locate=lambda name: source.locate(own.get(name, name)),
    )
