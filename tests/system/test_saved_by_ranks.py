"""Merged models of sharded modules: written by all ranks, read by one process and by any other division."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from harness.ranks import on_ranks
from system.test_layouts import LAYOUTS, Net, divided, full
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretrain_merge import load_merged
from pretrain_merge.errors import PretrainMergeError
from pretrain_merge.merged_models import whole_weights
from pretrain_merge.merged_models.merged import holds_weights_of, save_merged

PROVENANCE = {"steps": [1, 2], "coefficients": [0.5, 0.5]}


def saved_in_every_layout(folder):
    """Whole weights by layout, what loading them again gave, and what was said of another model's weights."""
    results = {}
    for layout in LAYOUTS:
        model, _ = divided(layout, True)
        weights = full(model)
        for name, largest in (("one", 10**9), ("many", 200)):
            save_merged(model, Path(folder) / layout / name, PROVENANCE, largest_file=largest)
        other, _ = divided(layout, True)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        differs = holds_weights_of(other, Path(folder) / layout / "many")
        load_merged(other, Path(folder) / layout / "many")
        results[layout] = {
            "weights": weights,
            "loaded": full(other),
            "holds": [differs, holds_weights_of(other, Path(folder) / layout / "many")],
        }
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def layouts(folder):
    return on_ranks(saved_in_every_layout, str(folder), num_ranks=4, timeout=90)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("files", ["one", "many"])
def test_one_process_reads_the_whole_weights_bit_for_bit(layouts, folder, layout, files):
    module = Net(8 if "tensor" in layout else 7)
    for parameter in module.parameters():
        parameter.data.zero_()
    provenance = load_merged(module, folder / layout / files)
    assert provenance["steps"] == [1, 2]
    for name, weight in layouts[0][layout]["weights"].items():
        assert torch.equal(weight, module.get_parameter(name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_above_a_size_the_weights_are_in_several_files_with_an_index_and_nothing_else_is_left(layouts, folder, layout):
    assert {path.name for path in (folder / layout / "one").iterdir()} == {"model.safetensors", "provenance.json"}
    index = json.loads((folder / layout / "many" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert files == {path.name for path in (folder / layout / "many").glob("*.safetensors")}
    assert {path.name for path in (folder / layout / "many").iterdir()} - files == {
        "model.safetensors.index.json",
        "provenance.json",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_module_takes_its_own_shards(layouts, layout):
    for rank in layouts:
        assert rank[layout]["holds"] == [False, True]
        for name, weight in rank[layout]["weights"].items():
            assert torch.equal(weight, rank[layout]["loaded"][name]), name


@pytest.mark.parametrize("damage", ["index", "elsewhere", "missing"])
def test_a_damaged_index_is_refused(layouts, folder, damage, tmp_path):
    path = shutil.copytree(folder / LAYOUTS[0] / "many", tmp_path / "copy")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    if damage == "index":
        index.write_text("{")
    elif damage == "elsewhere":
        content["weight_map"][first] = "../model.safetensors"
        index.write_text(json.dumps(content))
    else:
        del content["weight_map"][first]
        index.write_text(json.dumps(content))
    with pytest.raises(PretrainMergeError, match="Copy the folder again"):
        load_merged(Net(7), path)


class Wrapper(nn.Module):
    """A tied Hugging Face model."""

    def __init__(self, transformers):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True, dtype="bfloat16",
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config).bfloat16()


class WithBuffers(nn.Module):
    """Buffers that safetensors holds and finfo does not know."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 5)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))


def on_two_ranks(folder):
    transformers = pytest.importorskip("transformers")
    mesh = init_device_mesh("cpu", (2,))
    wrapped = Wrapper(transformers)
    for layer in wrapped.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    save_merged(wrapped, Path(folder) / "hugging face", PROVENANCE, largest_file=1000)
    buffers = fully_shard(WithBuffers(), mesh=mesh)
    buffers.steps += torch.distributed.get_rank()  # of each rank's own: that of rank 0 is written
    save_merged(buffers, Path(folder) / "buffers", PROVENANCE, largest_file=30)
    failed = {}
    for where in ("shards", "file", "publishing"):
        for on_rank in (0, 1):
            if (where, on_rank) != ("publishing", 1):
                failed[f"{where} on {on_rank}"] = failing(where, on_rank, buffers, Path(folder) / "failed")
    left = [path.name for path in Path(folder).iterdir()]
    torch.distributed.barrier()
    return {"failed": failed, "left": sorted(left)}


def failing(where, on_rank, module, target):
    """What this rank is told where the disk of one rank is full."""

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "shards": (whole_weights.HuggingFaceStorageWriter, "write_data"),
        "file": (whole_weights, "save_file"),
        "publishing": (Path, "rename"),
    }[where]
    whole = getattr(owner, name)
    if torch.distributed.get_rank() == on_rank:
        setattr(owner, name, full_disk)
    try:
        save_merged(module, target, PROVENANCE, largest_file=30)
    except PretrainMergeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(owner, name, whole)
    return ""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, on_ranks(on_two_ranks, str(folder), timeout=90)


def test_hugging_face_reads_a_model_that_two_ranks_saved(two_ranks):
    transformers = pytest.importorskip("transformers")
    folder = two_ranks[0] / "hugging face"
    assert (folder / "model.safetensors.index.json").exists()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = Wrapper(transformers).model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name


def test_buffers_of_any_kind_come_along(two_ranks):
    module = WithBuffers()
    module.layer.weight.data.zero_()
    module.steps.zero_()
    load_merged(module, two_ranks[0] / "buffers")
    expected = WithBuffers().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("failure", ["shards on 0", "shards on 1", "file on 0", "file on 1", "publishing on 0"])
def test_a_disk_that_is_full_on_one_rank_is_an_error_on_all_with_the_reason(two_ranks, failure):
    errors = [rank["failed"][failure] for rank in two_ranks[1]]
    assert all("No space left on device" in error for error in errors)
    assert any(error.startswith("CheckpointError") for error in errors)


def test_nothing_of_a_model_that_could_not_be_saved_is_left(two_ranks):
    assert [rank["left"] for rank in two_ranks[1]] == [["buffers", "hugging face"]] * 2
