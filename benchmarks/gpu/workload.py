"""What is merged and trained: tensors of a 7B Llama's shapes, and a 124M Llama with its batches. Knows sizes only."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.gpu.setting import Setting

Shapes = list[tuple[int, ...]]
LENGTH = 1024  # tokens of a sequence
VOCABULARY = 50_304


def llama_7b(most_elements: int, *, shrink: int = 1) -> Shapes:
    """Parameters of a 7B Llama: embedding, head and 32 layers, or as many of these as stay below `most_elements`."""
    width, hidden, vocabulary = 4096 // shrink, 11_008 // shrink, 32_000 // shrink
    layer = [(width, width)] * 4 + [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    ends = [(vocabulary, width), (vocabulary, width), (width,)]
    per_layer, per_ends = num_elements(layer), num_elements(ends)
    if most_elements < per_layer + per_ends:  # of large N: the layers alone
        return layer * max(1, most_elements // per_layer)
    return [*ends, *layer * min(32, (most_elements - per_ends) // per_layer)]


def num_elements(shapes: Shapes) -> int:
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def tensors(shapes: Shapes, dtype: torch.dtype, setting: Setting) -> list[Tensor]:
    return [torch.randn(shape, device=setting.device, dtype=torch.float32).to(dtype) for shape in shapes]


def llama_124m(setting: Setting) -> Any:
    """A Hugging Face Llama of 124M parameters, head tied to embedding, with random weights drawn from seed 0."""
    import transformers

    width, layers = setting.sized((768, 12), (64, 2))
    config = transformers.LlamaConfig(
        vocab_size=setting.sized(VOCABULARY, 256),
        hidden_size=width,
        intermediate_size=setting.sized(2048, 128),
        num_hidden_layers=layers,
        num_attention_heads=setting.sized(12, 2),
        num_key_value_heads=setting.sized(12, 2),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def elements_of_124m(setting: Setting) -> int:
    """Parameters of that model, without making it."""
    width, layers, hidden = 768, 12, 2048
    if setting.rehearses:
        width, layers, hidden = 64, 2, 128
    vocabulary = setting.sized(VOCABULARY, 256)
    return vocabulary * width + layers * (4 * width * width + 3 * hidden * width + 2 * width) + width


class Batches(Dataset[dict[str, Tensor]]):
    """Batch `i` of random tokens depends on `i` alone, so that two runs see the same."""

    def __init__(self, setting: Setting, number: int, *, first: int = 0) -> None:
        self._shape = setting.sized((16, LENGTH), (2, 16))
        self._vocabulary = setting.sized(VOCABULARY, 256)
        self._number = number
        self._first = first

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._number:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self._first + index)
        return {"input_ids": torch.randint(self._vocabulary, self._shape, generator=generator)}
