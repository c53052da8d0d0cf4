"""What a run ended with, as plain values, and which of its files nothing needs."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.crashes import processes
from pretrain_merge.callbacks.run_state import RunState
from pretrain_merge.files.sharded_folder import SUFFIX
from pretrain_merge.resume.needs import read_needs

Outcome = dict[str, Any]

_OF_EARLIER_STARTS = re.compile(
    r"merges\.\d+\.jsonl|merges\.config\.\d+\.yaml|merged\.\d+/.*|merges\.run\.\d+\.json|checkpoints/step=\d+\.ckpt|window/checkpoints\.json"
)


def outcome(folder: Path) -> Outcome:
    """Everything that is compared: tensors and merged models by digest, records by step, the manifest at one step."""
    # in a child, for the parent runs no torch
    out = folder.with_name("outcome.json")
    out.unlink(missing_ok=True)
    ended = processes.run(lambda: _write(out, _summary(folder)))
    if ended.error:
        raise RuntimeError(ended.error)
    return dict(json.loads(out.read_text()))


def differences(expected: Outcome, found: Outcome) -> list[str]:
    """The names of what is not the same, or is on one side only."""
    return sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))


def unexplained(folder: Path, reference: Path) -> list[str]:
    """Files of an ended run that nothing needs, and files that a checkpoint needs and that are not there."""
    known = {str(path.relative_to(reference)) for path in _files(reference) if path.parent.name != "window"}
    needs = read_needs(folder / "window")
    needed = {f"window/{name}" for all_needs in needs.values() for names in all_needs for name in names}
    names = [str(path.relative_to(folder)) for path in _files(folder)]

    def is_known(name: str) -> bool:
        inside_sharded = "/".join(name.split("/")[:2])
        return name in known | needed or inside_sharded in needed or bool(_OF_EARLIER_STARTS.fullmatch(name))

    extra = [name for name in names if not is_known(name)]
    extra += [f"needs of {path}, which is gone" for path in needs if not (folder / "window" / path).exists()]
    return extra + [f"{name}, which is missing" for name in sorted(needed) if not (folder / name).exists()]


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, by step."""
    return sorted((folder / "checkpoints").glob("*.ckpt"), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.partition("=")[2])


def our_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of ours."""
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    return dict(next(value for key, value in state.items() if key.startswith("ModelMerging")))


def _summary(folder: Path) -> Outcome:
    found: Outcome = {"weights": _digest(torch.load(folder / "final.pt"))}
    for path in sorted((folder / "merged").glob("*/model.safetensors")):
        found[str(path.relative_to(folder))] = _digest(load_file(path))
    for line in (folder / "merges.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("timing")
        key = f"record {record['step']}"
        found[key] = [*found.get(key, []), record]  # a step that appears twice differs
    recoveries = folder / "recoveries.jsonl"
    found["recoveries"] = recoveries.read_text() if recoveries.exists() else ""
    kept = checkpoints(folder)[-2]  # in every run that ends
    window = RunState.from_plain(our_state(kept)).window or {}
    found["manifest"] = _canonical(window["values"], folder / "window")
    return found


def _canonical(value: Any, window: Path) -> Any:
    """A manifest in which sharded snapshots are named by their tensors, as metadata have a random order (P30)."""
    if isinstance(value, dict) and str(value.get("name", "")).endswith(SUFFIX):
        parts = sorted((window / value["name"]).glob("*.safetensors"))
        return {
            "name": value["name"][: -len(SUFFIX)].rpartition("-")[0],
            "tensors": [_digest(load_file(p)) for p in parts],
        }
    if isinstance(value, dict):
        return {key: _canonical(item, window) for key, item in value.items()}
    return [_canonical(item, window) for item in value] if isinstance(value, list) else value


def _digest(tensors: dict[str, Tensor]) -> str:
    parts = [f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.numpy().tobytes() for name, t in sorted(tensors.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _write(path: Path, found: Outcome) -> None:
    path.write_text(json.dumps(found))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
