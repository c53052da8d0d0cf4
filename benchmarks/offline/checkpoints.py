"""Eight neighbours of one Llama, written as other programs write them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_LAYERS = 12


def write_checkpoints(folder: Path, *, quick: bool) -> int:
    """Eight neighbours of one model in three formats; returns their number of parameters."""
    base = {name: torch.randn(shape) * 0.02 for name, shape in shapes(16 if quick else 1)}
    writers: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
        "hf/checkpoint-{}": write_hugging_face,
        "ckpt/step={}.ckpt": _lightning,
        "dcp/step-{}": _dcp,
    }
    for step in range(100, 900, 100):
        state = {name: (value + torch.randn_like(value) * 0.002).bfloat16() for name, value in base.items()}
        for pattern, write in writers.items():
            path = folder / pattern.format(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(state, path)
    return sum(value.numel() for value in base.values())


def write_hugging_face(state: dict[str, torch.Tensor], path: Path) -> None:
    """A folder with `model.safetensors` and `config.json`."""
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    sizes = {"hidden_size": state["model.norm.weight"].numel(), "num_hidden_layers": _LAYERS, "vocab_size": 32000}
    (path / "config.json").write_text(json.dumps(_CONFIG | sizes))


def _lightning(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "global_step": int(path.stem[5:]), "pytorch-lightning_version": "2.6.0"}, path)


def _dcp(state: dict[str, torch.Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=str(path))


def shapes(shrink: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of 220M parameters, each side divided by `shrink`."""
    width, inner, words = 1024 // shrink, 2816 // shrink, 32000 // shrink
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (words, width))]
    for layer in range(_LAYERS):
        names = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
        names |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        shapes += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in names.items()]
        shapes += [
            (f"model.layers.{layer}.{name}.weight", (width,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    return [*shapes, ("model.norm.weight", (width,)), ("lm_head.weight", (words, width))]
