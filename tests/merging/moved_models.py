"""Models that move without an optimizer, what they were at every step, and what a merge of that must be."""

import numpy as np
import torch
from harness import oracles
from torch import nn

VIEWS = [
    "sma",
    "sma2",
    "wma",
    "ema",
    "wsm",
    {"name": "cos3", "kind": "decay", "shape": "cosine", "last": 3},
    {"name": "mine", "kind": "custom", "weights": [-0.5, 0.25, 1.25]},
]


class Mixed(nn.Module):
    """Parameters of several dtypes, a tied one, a frozen one, and buffers that no merge may touch."""

    def __init__(self, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 3, dtype=dtype) for dtype in dtypes)
        self.tied = self.layers[0]
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.randn(2), persistent=False)
        self.register_buffer("bias", torch.randn(2))


def move(module, step):
    """Stands for an optimizer step: another value for every trainable parameter, in place; and buffers that move."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)
        for buffer in module.buffers():
            buffer.add_(1) if buffer.dtype != torch.bool else buffer.logical_not_()


def state(module):
    """Every parameter and buffer, bit for bit."""
    return {
        name: (tensor.dtype, bits(tensor)) for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def train(module, merging, steps, *, lr=0.1, after_step=None):
    """Moves and observes; returns the float64 values of the trainable parameters at every step."""
    trajectory = {}
    for step in steps:
        move(module, step)
        if after_step:
            after_step(step)
        merging.observe(module, step, lr=lr)
        trajectory[step] = values(module)
    return trajectory


def values(module):
    named = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    return {name: tensor.detach().double().numpy().copy() for name, tensor in named.items()}


def assert_is_merge(module, trajectory, steps, weights):
    """The live model is the weighted sum of these steps, to one rounding of each parameter's dtype."""
    for name, merged in values(module).items():
        snapshots = [trajectory[step][name] for step in steps]
        dtype = str(module.get_parameter(name).dtype).removeprefix("torch.")
        error = np.abs(merged - oracles.merged(snapshots, weights))
        assert np.all(error <= oracles.merge_tolerance(snapshots, weights, dtype)), name


def model_at(step=0):
    """One number per step, so that a merge can be read off."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, step)
    return module


def counting(merging, steps, **options):
    """Observe a model whose weight is the step number."""
    module = model_at()
    return module, [step for step in steps if observe_at(merging, module, step, **options)]


def observe_at(merging, module, step, **options):
    with torch.no_grad():
        module.weight.fill_(step)
    return merging.observe(module, step, **options)


def held(merging):
    return [item.progress.step for item in merging.window.valid]


def rates(merging, lr_at, steps=range(1, 61)):
    module = model_at()
    for step in steps:
        observe_at(merging, module, step, lr=lr_at(step))
    return module
