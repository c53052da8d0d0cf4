"""Parameters are counted as the model itself counts them, from whatever its user has of it."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from pretrain_merge.cli.model_shapes import read_model
from pretrain_merge.demo.models import build_model
from pretrain_merge.errors import CheckpointError, ConfigError, MissingDependencyError


@pytest.mark.parametrize(
    ("text", "total"), [("7B", 7 * 10**9), ("411m", 411 * 10**6), ("1.5 B", 1_500_000_000), ("12", 12)]
)
def test_a_count(text, total):
    model = read_model(text)
    assert (model.total, model.activated, model.source) == (total, total, text)
    assert not model.has_experts


def test_activated_parameters_as_given():
    model = read_model("400B", activated="17B")
    assert (model.total, model.activated) == (400 * 10**9, 17 * 10**9)
    assert model.has_experts


@pytest.fixture(params=["llama", "moe"])
def built(request):
    pytest.importorskip("transformers")
    return build_model(request.param, seed=0)


def own_shapes(model):
    """Of the parameters that train, tied ones once."""
    return sorted(tuple(parameter.shape) for parameter in model.parameters())


def activated(model):
    """Parameters that a token meets, counted by the experts that a router of two out of four leaves out."""
    resting = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name) // 2
    return sum(parameter.numel() for parameter in model.parameters()) - resting


def test_a_configuration_counts_as_the_model_does(built, tmp_path):
    built.config.save_pretrained(tmp_path)
    for source in (tmp_path / "config.json", tmp_path):
        model = read_model(str(source))
        assert sorted(model.shapes) == own_shapes(built)
        assert model.activated == activated(built)


def test_saved_weights_count_as_the_model_does(built, tmp_path):
    built.save_pretrained(tmp_path)
    model = read_model(str(tmp_path / "model.safetensors"))
    assert model.total == sum(parameter.numel() for parameter in built.parameters())
    assert model.activated == activated(built)


def test_an_index_counts_all_of_its_files(built, tmp_path):
    built.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = read_model(str(tmp_path / "model.safetensors.index.json"))
    assert model.total == sum(parameter.numel() for parameter in built.parameters())
    assert model.activated == activated(built)


def test_an_index_alone_has_its_total(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_parameters": 321}, "weight_map": {"a": "missing.safetensors"}}))
    assert read_model(str(path)).total == 321
    path.write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"no total_parameters.*give the number"):
        read_model(str(path))


def test_no_weights_are_allocated_for_a_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = 10**6  # of the embedding alone: four terabytes
    transformers.LlamaConfig(vocab_size=size, hidden_size=size, num_hidden_layers=1).save_pretrained(tmp_path)
    assert read_model(str(tmp_path)).total > 2 * size * size


def experts_in_a_file(folder):
    tensors = {"model.experts.0.w": torch.ones(4, 5), "model.experts.1.w": torch.ones(4, 5), "norm": torch.ones(6)}
    save_file(tensors, folder / "model.safetensors")
    return str(folder / "model.safetensors")


@pytest.mark.parametrize(
    "configuration",
    [{"num_experts": 2, "num_experts_per_tok": 1}, {"text_config": {"n_routed_experts": 2, "top_k": 1}}],
)
def test_a_configuration_beside_weights_says_how_many_experts_work(tmp_path, configuration):
    path = experts_in_a_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    assert read_model(path).activated == 20 + 6


def test_experts_of_which_nothing_is_known_need_a_number(tmp_path):
    path = experts_in_a_file(tmp_path)
    with pytest.raises(ConfigError, match=r"activated: .*Give the\s+number"):
        read_model(path)
    assert read_model(path, activated="30").activated == 30


@pytest.mark.parametrize(
    ("source", "activated", "piece"),
    [
        ("7X", None, "model: '7X' is neither a file nor a number"),
        ("no/such/config.json", None, "neither a file"),
        ("0", None, "neither a file"),
        ("7B", "8B", "activated: 8000000000 of 7000000000"),
        ("7B", "many", "activated: 'many'"),
    ],
)
def test_what_is_no_model_is_refused_with_what_is_allowed(source, activated, piece):
    with pytest.raises(ConfigError, match=r"Allowed: ") as caught:
        read_model(source, activated=activated)
    assert piece in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{"])
def test_a_damaged_file_is_said(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_model(str(path))


@pytest.mark.parametrize(
    ("content", "error", "piece"),
    [
        ("{", CheckpointError, "cannot be read as JSON"),
        ("[]", CheckpointError, "does not hold a JSON object"),
        ('{"model_type": "no-such-model"}', ConfigError, "builds no causal language model"),
        ('{"model_type": "vit"}', ConfigError, "builds no causal language model"),
    ],
)
def test_a_configuration_that_builds_nothing_is_said(tmp_path, content, error, piece):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=piece):
        read_model(str(tmp_path))


def test_without_transformers_a_number_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingDependencyError, match="give the number of parameters"):
        read_model(str(tmp_path))
