"""A merge of a Hugging Face model is a folder that `from_pretrained` reads."""

import copy
from typing import Any

import pytest
import torch
from harness.models import LIGHTNING_REMARKS, TiedModel, documents, same_bits, trainer
from torch import Tensor

from pretrain_merge import ModelMerging, load_merged

pytestmark = LIGHTNING_REMARKS
_SIZES = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def _hugging_face_module(kind: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **options)

    class Module(TiedModel):
        def __init__(self) -> None:
            super(TiedModel, self).__init__()
            self.model = getattr(transformers, f"{kind}ForCausalLM")(config)

        def loss(self, batch: Any) -> Tensor:
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.float()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    return Module()


@pytest.mark.parametrize(
    ("kind", "options", "precision"),
    [
        ("Llama", {"tie_word_embeddings": True}, "32-true"),
        ("Llama", {"tie_word_embeddings": False}, "bf16-true"),
        ("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, "32-true"),
    ],
)
def test_a_hugging_face_model_loads_back_with_from_pretrained(kind, options, precision, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens, logits = torch.arange(10).view(1, 10), []
    module = _hugging_face_module(kind, **options)

    def look(module: Any) -> dict[str, float]:
        logits.append(module.model(input_ids=tokens).logits)
        return {}

    merging = ModelMerging(window=2, every=2, save={"every": 4}, evaluators={"look": look})
    trainer(tmp_path, merging, max_steps=4, precision=precision).fit(module, documents(), documents(4, seed=1))
    folder = tmp_path / "merged" / "step-00000004-sma"
    assert {"config.json", "model.safetensors", "provenance.json"} <= {path.name for path in folder.iterdir()}
    loaded = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(folder, dtype="auto").eval()
    # a copy, since kernels round otherwise in memory that is mapped at odd addresses; and all in one dtype, rotary
    # frequencies too, as Lightning's bf16-true has it
    loaded = copy.deepcopy(loaded).to(logits[0].dtype)
    raw, merged = logits
    with torch.no_grad():
        assert same_bits(loaded(input_ids=tokens).logits, merged)
    assert not same_bits(raw, merged)
    again = _hugging_face_module(kind, **options).to(loaded.dtype)
    load_merged(again, folder)
    with torch.no_grad():
        assert same_bits(again.eval().model(input_ids=tokens).logits, merged)
