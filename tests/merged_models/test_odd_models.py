"""Models whose state dict is not what it seems (odd dtypes, copies, overlaps, renamed parts): saved, or refused."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pretrain_merge import load_merged
from pretrain_merge.cadence import Progress
from pretrain_merge.config import SaveConfig
from pretrain_merge.errors import CheckpointError, UnsupportedModelError
from pretrain_merge.merged_models.merged import read_provenance, save_merged, try_saving
from pretrain_merge.merged_models.retention import MergedModels
from pretrain_merge.parameters.bits import copy_of, same_bits
from pretrain_merge.records import Recipe

BYTES = torch.arange(48, dtype=torch.uint8)
ODD = {
    **{name: BYTES.view(getattr(torch, name)) for name in ("complex128", "complex64", "bits16", "uint16")},
    **{name: BYTES.view(getattr(torch, name)) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2", "uint4", "int1")},
    "conjugate": BYTES.view(torch.complex64).conj(),
    "negative": BYTES.view(torch.complex64).conj().imag,
    "expanded": torch.tensor([3.0]).expand(4),
    "scalar": torch.tensor(1j, dtype=torch.complex128),
    "not a number": torch.tensor([float("nan"), -0.0]),
}
with warnings.catch_warnings():  # of torch, on what it calls prototypes
    warnings.simplefilter("ignore")
    IMPOSSIBLE = {
        "sparse_coo": torch.eye(2).to_sparse(),
        "sparse_csr": torch.eye(2).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.empty(2, device="meta"),
    }


class WithBuffer(nn.Module):
    def __init__(self, value, fill=None):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("odd_one", copy_of(value) if fill is None else fill)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_a_buffer_of_any_dtype_comes_back_bit_for_bit(value, tmp_path):
    save_merged(WithBuffer(value, value), tmp_path / "model", {})
    module = WithBuffer(value, torch.zeros_like(value.real).expand(value.shape) if value.numel() == 4 else None)
    if value.numel() != 4:
        written = torch.empty(0, dtype=torch.uint8).set_(module.odd_one.untyped_storage())
        written.fill_(0)
    load_merged(module, tmp_path / "model")
    assert same_bits(module.odd_one, value)


@pytest.mark.parametrize("value", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_safetensors_cannot_hold_is_refused_before_training_and_at_the_save(value, tmp_path):
    module = WithBuffer(value, value)
    for use in (try_saving, lambda module: save_merged(module, tmp_path / "model", {})):
        with pytest.raises(UnsupportedModelError, match=r"'odd_one' .*persistent=False"):
            use(module)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_files_keep_for_themselves_is_refused_before_training_and_at_the_save(tmp_path):
    module = nn.Linear(2, 2)
    module.register_parameter("__metadata__", nn.Parameter(torch.ones(1)))
    for use in (try_saving, lambda module: save_merged(module, tmp_path / "model", {})):
        with pytest.raises(UnsupportedModelError, match="'__metadata__', which is the header's own name"):
            use(module)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_by_a_text_is_the_same_folder(tmp_path):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_merged(module, str(tmp_path / "model"), {})
    load_merged(other, str(tmp_path / "model"))
    assert same_bits(other.weight, module.weight)


def test_a_buffer_that_is_a_slice_of_a_parameter_is_saved_beside_it(tmp_path):
    def make():
        module = nn.Linear(2, 2)
        module.register_buffer("row", module.weight.detach()[0])
        return module

    first, second = make(), make()
    save_merged(first, tmp_path / "model", {})
    load_merged(second, tmp_path / "model")
    assert torch.equal(second.row, first.weight[0])


class Copies(nn.Module):
    """Shows copies in its state dict, as modules do that cast or rename on the way out."""

    takes_back = True

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def state_dict(self, *args, **kwargs):
        return {f"half.{name}": value.bfloat16() for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state, *args, **kwargs):
        if self.takes_back:
            super().load_state_dict({name.removeprefix("half."): value.float() for name, value in state.items()})
        else:
            nn.init.zeros_(self.layer.weight)


def test_a_module_that_shows_copies_is_loaded_by_its_own_loader(tmp_path):
    first, second = Copies(), Copies()
    save_merged(first, tmp_path / "model", {})
    load_merged(second, tmp_path / "model")
    assert torch.equal(second.layer.weight, first.layer.weight.bfloat16().float())


def test_a_module_that_shows_copies_and_takes_none_back_is_an_error_and_stays_as_it_was(tmp_path):
    save_merged(Copies(), tmp_path / "model", {})
    module = Copies()
    module.takes_back = False
    before = module.layer.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"state_dict of Copies returns copies.*Override both"):
        load_merged(module, tmp_path / "model")
    assert torch.equal(module.layer.weight, before)


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.Linear(2, 2, device="meta")])
def test_a_module_without_memory_is_refused(make, tmp_path):
    save_merged(nn.Linear(2, 2), tmp_path / "model", {})
    with pytest.raises(CheckpointError, match="no memory here"):
        load_merged(make(), tmp_path / "model")


@pytest.mark.parametrize("bit", [3, 8 * 100, -1])
def test_a_flipped_bit_anywhere_in_the_weights_is_found_before_anything_is_written(bit, tmp_path):
    save_merged(nn.Linear(2, 2), tmp_path / "model", {})
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError, match="is damaged"):
        load_merged(module, tmp_path / "model")
    assert torch.equal(module.weight, before)


def test_a_folder_without_checksums_of_an_earlier_version_is_read(tmp_path):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    save_merged(module, tmp_path / "model", {})
    path = tmp_path / "model" / "provenance.json"
    about = json.loads(path.read_text())
    came_later = ("files", "as_integers", "crc32")
    path.write_text(json.dumps({key: value for key, value in about.items() if key not in came_later}))
    load_merged(other, tmp_path / "model")
    assert torch.equal(other.weight, module.weight)


def saved(models, step, loss, module=None):
    recipe = Recipe((step,), (1.0,))
    models.save_if_due(module or nn.Linear(1, 1), "sma", Progress(step), recipe, {"val_loss": loss})


def test_provenance_says_why_a_model_was_saved_and_best_json_which_is_the_best(tmp_path):
    models = MergedModels(tmp_path / "merged", SaveConfig(every=10, keep=5, best="val_loss", at_end=True), {})
    module = nn.Linear(1, 1)
    for step, loss in ((5, 3.0), (10, 2.0), (20, 4.0)):
        saved(models, step, loss, module)
    models.save_last(module, "sma", Progress(20), Recipe((20,), (1.0,)))
    why = {path.name: read_provenance(path)["saved_for"] for path in (tmp_path / "merged").glob("step-*")}
    assert why == {"step-00000010-sma": ["every", "best"], "step-00000020-sma": ["every", "at_end"]}
    best = json.loads((tmp_path / "merged" / "best.json").read_text())
    assert best == {
        "folder": "step-00000010-sma", "metric": "val_loss", "mode": "min", "step": 10, "value": 2.0, "view": "sma",
    }  # fmt: skip


def test_best_json_follows_a_run_that_goes_on_from_an_earlier_checkpoint(tmp_path):
    config = SaveConfig(best="val_loss", every=1, keep=9)
    models = MergedModels(tmp_path / "merged", config, {})
    saved(models, 1, 3.0)
    earlier = models.state()
    saved(models, 2, 2.0)
    MergedModels(tmp_path / "merged", config, {}).resume_from(earlier, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "best.json").read_text())["step"] == 1


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4
    )
    return lambda: transformers.LlamaForCausalLM(config)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def pruned(model):
    prune.l1_unstructured(model.model.layers[0].mlp.down_proj, "weight", 0.5)


def adapted(model):
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora = base, nn.Linear(4, 4)

    model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj)


def renamed(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


@pytest.mark.parametrize("change", [pruned, adapted, renamed])
def test_a_changed_hugging_face_model_does_not_look_like_one_of_theirs(change, llama, tmp_path, caplog):
    model = llama()
    change(model)
    save_merged(Wrapper(model), tmp_path / "model", {})
    assert not (tmp_path / "model" / "config.json").exists()
    assert "without config.json" in caplog.text
    other = llama()
    change(other)
    load_merged(Wrapper(other), tmp_path / "model")
    assert all(map(same_bits, model.state_dict().values(), other.state_dict().values()))


def test_a_configuration_that_cannot_be_saved_is_said_before_training_and_left_out(llama, tmp_path, caplog):
    model = llama()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    try_saving(Wrapper(model))
    assert "without generation_config.json" in caplog.text
    save_merged(Wrapper(model), tmp_path / "model", {})
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "provenance.json",
    }  # fmt: skip


def test_looking_whether_a_model_is_theirs_draws_no_random_number(llama):
    model = Wrapper(llama())
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    from pretrain_merge.merged_models import hugging_face

    hugging_face._kinds.clear()
    try_saving(model)
    assert (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()) == states
