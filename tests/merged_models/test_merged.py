"""Merged models on disk: read back strictly, with their provenance, and by Hugging Face where they are theirs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain_merge import load_merged
from pretrain_merge.errors import CheckpointError
from pretrain_merge.merged_models.merged import read_provenance, save_merged
from pretrain_merge.merged_models.provenance import write_provenance

PROVENANCE = {"steps": [100, 200], "coefficients": [0.5, 0.5], "view": "sma", "step": 200}


class Model(nn.Module):
    """Ties, buffers of every kind, several dtypes, strides and an empty tensor."""

    def __init__(self, seed=0, width=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.small = nn.Linear(width, width, dtype=torch.bfloat16)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.randn(4, dtype=torch.float64), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("steps", torch.tensor(7 + seed))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.randn(2), persistent=False)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def saved(tmp_path):
    save_merged(Model(), tmp_path / "step-00000200-sma", PROVENANCE)
    return tmp_path / "step-00000200-sma"


def refusal(module, path):
    before = state(module)
    with pytest.raises(CheckpointError) as caught:
        load_merged(module, path)
    assert_equal(state(module), before)
    return str(caught.value)


def test_a_model_reads_back_bit_for_bit(saved):
    other = Model(seed=1)
    load_merged(other, saved)
    assert_equal(state(other), state(Model()))


def test_ties_are_stored_once_and_still_ties_when_read(saved):
    assert len(load_file(saved / "model.safetensors")) == len(Model().state_dict()) - 1
    other = Model(seed=1)
    load_merged(other, saved)
    assert other.head.weight is other.embed.weight


def test_a_model_without_the_tie_gets_both_weights(saved):
    other = Model(seed=1)
    other.head.weight = nn.Parameter(torch.randn(5, 3))
    load_merged(other, saved)
    assert torch.equal(other.head.weight, Model().embed.weight)
    assert torch.equal(other.embed.weight, Model().embed.weight)


def test_provenance_says_how_the_weights_were_made_and_by_what(saved):
    provenance = load_merged(Model(), saved)
    assert PROVENANCE.items() <= provenance.items()
    assert provenance["format"] == "pretrain-merge/1"
    assert provenance["model"] == "Model"
    assert provenance["ties"] == {"head.weight": "embed.weight"}
    assert provenance["dtypes"] == ["bfloat16", "bool", "float32", "float64", "int64"]
    assert provenance["versions"].keys() == {"pretrain-merge", "torch", "lightning", "safetensors"}
    assert provenance == read_provenance(saved)


def test_p30_provenance_is_the_same_file_whenever_it_is_written(saved, tmp_path):
    save_merged(Model(), tmp_path / "again", PROVENANCE)
    assert (tmp_path / "again" / "provenance.json").read_bytes() == (saved / "provenance.json").read_bytes()
    text = (saved / "provenance.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_no_file_is_a_pickle(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "provenance.json"]
    assert all(not path.read_bytes().startswith((b"\x80", b"PK")) for path in saved.iterdir())


def test_a_compiled_model_and_a_plain_one_read_each_others_files(saved, tmp_path):
    compiled = torch.compile(Model(seed=1), backend="eager")
    load_merged(compiled, saved)
    assert_equal(state(compiled._orig_mod), state(Model()))
    save_merged(compiled, tmp_path / "compiled", PROVENANCE)
    load_merged(Model(seed=2), tmp_path / "compiled")


def test_the_model_that_was_saved_stays_as_it_was(tmp_path):
    module = Model()
    before, strides = state(module), module.conv.weight.stride()
    save_merged(module, tmp_path / "model", PROVENANCE)
    assert_equal(state(module), before)
    assert module.conv.weight.stride() == strides


class _WithExtraState(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.ones(2)), extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_p20_extra_state_is_handed_to_its_module_whatever_its_size(tmp_path):
    save_merged(nn.Sequential(_WithExtraState(torch.arange(3))), tmp_path / "merged", {})
    model = nn.Sequential(_WithExtraState(torch.zeros(0)))
    load_merged(model, tmp_path / "merged")
    assert torch.equal(model[0].extra, torch.arange(3))


def test_p20_extra_state_that_only_a_pickle_could_hold_is_left_out_and_said(tmp_path, caplog):
    save_merged(_WithExtraState({"scale": object()}), tmp_path / "merged", {})
    (message,) = caplog.messages
    assert "is saved without _extra_state" in message
    assert "Return a tensor from get_extra_state" in message


def test_a_folder_that_exists_is_never_overwritten(saved):
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_merged(Model(seed=1), saved, PROVENANCE)
    load_merged(Model(), saved)


def test_another_model_is_refused_with_what_is_missing_and_what_is_left(saved):
    other = Model(seed=1)
    other.extra = nn.Linear(2, 2)
    del other.small
    message = refusal(other, saved)
    assert f"{saved} does not fit Model" in message
    for piece in (
        "missing in the file: extra.bias",
        "missing in the file: extra.weight",
        "not in the model: small.weight",
    ):
        assert piece in message
    assert "Build the model with the configuration and dtype it was trained with" in message


def test_another_shape_and_another_dtype_are_refused_by_name(saved):
    other = Model(seed=1, width=4)
    other.small = other.small.float()
    message = refusal(other, saved)
    assert "embed.weight: torch.float32 (5, 3) in the file, torch.float32 (5, 4) here" in message
    assert "small.bias: torch.bfloat16 (3,) in the file, torch.float32 (4,) here" in message


def test_many_problems_are_counted_not_listed(saved):
    message = refusal(nn.Sequential(*(nn.Linear(2, 2) for _ in range(10))), saved)
    assert "and 25 more" in message
    assert message.count("missing in the file") == 5


@pytest.mark.parametrize(
    ("damage", "piece"),
    [
        (lambda folder: (folder / "provenance.json").unlink(), "is not a merged model"),
        (lambda folder: (folder / "provenance.json").write_text("{"), "is not a merged model"),
        (lambda folder: (folder / "provenance.json").write_bytes(b"\xff\xfe"), "is not a merged model"),
        (lambda folder: (folder / "provenance.json").write_text("[]"), "is not of format 'pretrain-merge/1'"),
        (lambda folder: (folder / "provenance.json").write_text('{"format": "pretrain-merge/9"}'), "Read it with"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04."), "is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is damaged"),
        (lambda folder: cut(folder / "model.safetensors", 20), "is damaged"),
        (lambda folder: edit(folder, ties={"head.weight": "nowhere"}), "is damaged"),
        (lambda folder: edit(folder, ties=5), "is damaged"),
        (lambda folder: edit(folder, prefix=5), "is damaged"),
        (lambda folder: change(folder, "0.5", "0.6"), "its values are not those that were saved"),
        (lambda folder: change(folder, '"step"', '"stop"'), "its values are not those that were saved"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_damaged_folder_is_refused(saved, damage, piece):
    damage(saved)
    message = refusal(Model(seed=1), saved)
    assert str(saved) in message
    assert piece in message


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def edit(folder, **values):
    write_provenance(folder, read_provenance(folder) | values)


def change(folder, before, after):
    path = folder / "provenance.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_a_provenance_may_be_laid_out_anew_and_one_of_an_earlier_version_has_no_checksum(saved):
    path = saved / "provenance.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(about.items()))))
    assert read_provenance(saved)["coefficients"] == [0.5, 0.5]
    path.write_text(json.dumps(about | {"note": "ours"}).replace('"crc32"', '"was"'))
    assert read_provenance(saved)["note"] == "ours"


def test_a_path_that_is_no_folder_says_what_to_name(tmp_path):
    message = refusal(Model(), tmp_path / "nowhere")
    assert "Name a folder that holds model.safetensors and provenance.json" in message


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def tiny_llama(transformers, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def test_a_wrapped_hugging_face_model_is_read_by_from_pretrained(transformers, tmp_path):
    module = Wrapper(tiny_llama(transformers))
    save_merged(module, tmp_path / "merged", PROVENANCE)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_equal(state(loaded), state(module.model))
    other = Wrapper(tiny_llama(transformers, seed=1))
    load_merged(other, tmp_path / "merged")
    assert_equal(state(other), state(module))


def test_a_hugging_face_model_beside_other_weights_keeps_its_names(transformers, tmp_path):
    module = Wrapper(tiny_llama(transformers))
    module.head = nn.Linear(2, 2)
    save_merged(module, tmp_path / "merged", PROVENANCE)
    assert not (tmp_path / "merged" / "config.json").exists()
    assert "model.model.norm.weight" in load_file(tmp_path / "merged" / "model.safetensors")
