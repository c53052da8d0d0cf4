"""A saved merge loads back bit for bit into the model that it is of, and into no other."""

from pathlib import Path

import pytest
from harness.models import LIGHTNING_REMARKS, Regression, TiedModel, documents, rows, same_bits, trainer, weights
from torch import Tensor, nn

from pretrain_merge import ModelMerging, load_merged
from pretrain_merge.errors import CheckpointError

pytestmark = LIGHTNING_REMARKS


@pytest.fixture
def merged_tied_model(tmp_path: Path) -> Path:
    merging = ModelMerging(window=2, every=2, save={"at_end": True})
    trainer(tmp_path, merging, max_steps=4).fit(TiedModel(), documents(), documents(4, seed=1))
    return tmp_path / "merged" / "step-00000004-sma"


def test_tied_weights_are_stored_once_and_load_back_tied(merged_tied_model):
    from safetensors import safe_open

    with safe_open(merged_tied_model / "model.safetensors", framework="pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118 - safe_open is no mapping
        assert "head.weight" not in file.keys()  # noqa: SIM118
    module = TiedModel()
    load_merged(module, merged_tied_model)
    assert module.head.weight is module.embedding.weight


@pytest.mark.parametrize(
    ("other", "pieces"),
    [
        (lambda: TiedModel(width=5), ["embedding.weight", "(11, 4) in the file", "(11, 5) here"]),
        (lambda: TiedModel().bfloat16(), ["embedding.weight", "torch.float32", "torch.bfloat16"]),
        (lambda: Regression(), ["missing in the file: net.0.weight", "not in the model: embedding.weight"]),
        (lambda: nn.Linear(1, 1), [["missing in the file: bias", " missing in the file: weight"][0]]),
    ],
)
def test_another_model_is_refused_with_what_differs_and_left_as_it_was(other, pieces, merged_tied_model):
    module = other()
    before = weights(module)
    with pytest.raises(CheckpointError) as error:
        load_merged(module, merged_tied_model)
    for piece in [*pieces, "does not fit", type(module).__name__, "Build the model with the configuration"]:
        assert piece in str(error.value)
    assert same_bits(weights(module), before)


def test_a_part_of_the_model_is_told_which_module_the_weights_are_of(tmp_path):
    merging = ModelMerging(window=2, every=2, save={"at_end": True})
    whole = Regression()
    trainer(tmp_path, merging, max_steps=4).fit(whole, rows(), rows())
    saved = tmp_path / "merged" / "step-00000004-sma"
    with pytest.raises(CheckpointError, match=r"of a module that has this one as 'net': load it into that module"):
        load_merged(whole.net, saved)
    wrapper = nn.Module()
    wrapper.model = nn.ModuleDict({"inner": whole})
    with pytest.raises(
        CheckpointError, match=r"of the part 'model\.inner' alone: load it into module\.get_submodule\('model\.inner'\)"
    ):
        load_merged(wrapper, saved)
    load_merged(wrapper.get_submodule("model.inner"), saved)


def test_a_folder_that_is_no_merged_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a merged model.*as ModelMerging saves it under merged/"):
        load_merged(TiedModel(), tmp_path)


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_truncated_file_is_refused(cut, merged_tied_model):
    path = merged_tied_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    module = TiedModel()
    before = weights(module)
    with pytest.raises(CheckpointError, match="Copy the folder again"):
        load_merged(module, merged_tied_model)
    assert same_bits(weights(module), before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_a_merged_model_loads_back_bit_for_bit(precision, tmp_path):
    shown: list[dict[str, Tensor]] = []
    merging = ModelMerging(
        window=2, every=2, save={"every": 4}, evaluators={"look": lambda module: shown.append(weights(module)) or {}}
    )
    trainer(tmp_path, merging, max_steps=4, precision=precision).fit(TiedModel(), documents(), documents(4, seed=1))
    module = TiedModel().to(shown[-1]["embedding.weight"].dtype)
    load_merged(module, tmp_path / "merged" / "step-00000004-sma")
    assert same_bits(weights(module), shown[-1])
