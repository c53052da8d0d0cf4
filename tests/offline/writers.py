"""The same tensors in every format that can be merged, each written by the library that people use for it."""

import io
import json
import pickle
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pretrain_merge.merged_models.provenance import read_provenance


def tensors(seed):
    """Every dtype that is merged, odd shapes, what is copied, and a constant."""
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 16),
        "a.weight": torch.randn(16, 24, dtype=torch.bfloat16),
        "b.weight": torch.randn(5, dtype=torch.float16),
        "c.weight": torch.randn(3, 7, 2, dtype=torch.float64),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "constant": torch.full((3,), 0.1),
        "position_ids": torch.arange(4)[None] + seed,
        "mask": torch.tensor([True, False]),
    }


def safetensors_file(folder, step, state):
    path = folder / f"model-step{step}.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def hugging_face(folder, step, state):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    half = len(state) // 2
    files = {
        "model-00001-of-00002.safetensors": list(state)[:half],
        "model-00002-of-00002.safetensors": list(state)[half:],
    }
    for file, names in files.items():
        save_file({name: state[name].contiguous() for name in names}, path / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text("{}")
    return path


def pt(folder, step, state):
    path = folder / f"step_{step}.pt"
    torch.save(state, path)
    return path


def torch_bin(folder, step, state):
    path = folder / f"bin-step-{step}"
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")
    return path


def lightning(folder, step, state, **more):
    path = folder / f"epoch=0-step={step}.ckpt"
    torch.save({"state_dict": state, "global_step": step, "pytorch-lightning_version": "2.6.0"} | more, path)
    return path


def dcp_folder(folder, step, state):
    """torchtitan's: the model's names alone, beside an optimizer."""
    path = folder / f"step-{step}"
    optimizer = {"optimizer": {"state.a.weight.exp_avg": torch.randn(3)}, "train_state": {"step": torch.tensor(step)}}
    _save_dcp(state | optimizer, path)
    return path


def lightning_sharded(folder, step, state):
    path = folder / "sharded" / str(step)
    _save_dcp({"state_dict": state, "optimizer_0": {"state": {"a.weight": {"exp_avg": torch.randn(3)}}}}, path)
    torch.save({"global_step": step, "epoch": 0}, path / "meta.pt")
    return path


def dcp_of_ranks(folder, step, state):
    """As several ranks write: each tensor in four boxes, by rows and by columns, in two files."""
    path = folder / f"ranks-step-{step}"
    path.mkdir()
    files = [io.BytesIO(), io.BytesIO()]
    entries, places = {}, {}
    for name, value in state.items():
        chunks = []
        for index, (offsets, box) in enumerate(boxes(value)):
            file = files[index % 2]
            start = file.tell()
            torch.save(box.clone(), buffer := io.BytesIO())
            file.write(buffer.getvalue())
            places[MetadataIndex(name, torch.Size(offsets), index)] = _StorageInfo(
                f"__{index % 2}_0.distcp", start, file.tell() - start
            )
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), box.shape))
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, chunks)
    for number, file in enumerate(files):
        (path / f"__{number}_0.distcp").write_bytes(file.getvalue())
    metadata = Metadata(entries, {name: (name,) for name in state}, places)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def window(folder, step, state):
    """A snapshot of ours."""
    path = folder / f"snapshot-{step:08d}-0123abcd.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def sharded_window(folder, step, state):
    """A snapshot of a sharded run: boxes of tensors in safetensors files, as DCP's safetensors storage has them."""
    path = folder / f"snapshot-{step:08d}-0123abcd.sharded"
    path.mkdir()
    parts = [{}, {}, {}, {}]
    for name, value in state.items():
        for index, (offsets, box) in enumerate(boxes(value)):
            parts[index][name] = (offsets, box.contiguous())
    for number, part in enumerate(parts, 1):
        info = {name: {"saved_offsets": list(offsets)} for name, (offsets, _) in part.items()}
        held = {name: box for name, (_, box) in part.items()}
        save_file(held, path / f"shard-{number:05d}-model.safetensors", {"DCP_SHARDING_INFO": json.dumps(info)})
    (path / "parts.json").write_text("[]")
    return path


FORMATS = [
    safetensors_file, hugging_face, pt, torch_bin, lightning, dcp_folder, lightning_sharded, dcp_of_ranks, window,
    sharded_window,
]  # fmt: skip


def boxes(value):
    """Up to four boxes that make up a tensor."""
    if value.dim() < 2 or 0 in value.shape:
        return [((0,) * value.dim(), value)]
    row, column = value.shape[0] // 3, value.shape[-1] // 2
    rest = (0,) * (value.dim() - 2)
    found = []
    for first, rows in ((0, value[:row]), (row, value[row:])):
        for start, part in ((0, rows[..., :column]), (column, rows[..., column:])):
            if part.numel():
                found.append(((first, *rest, start), part))
    return found


def read(folder):
    """Every tensor of a merged folder, and its provenance."""
    found = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        found |= load_file(path)
    return found, read_provenance(Path(folder))


def _save_dcp(state, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(path))


def copy_as(path, name):
    target = path.with_name(name)
    (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    return target
