"""A new user's script: a small GPT of their own, tuple batches, a warm-up by `LambdaLR`, a torchmetrics metric.

Nothing here knows of merging, and nothing is shared with the demo: it is what somebody else would have written.
"""

from typing import Any

import lightning as L
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

LENGTH = 32  # bytes a block


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Experts(nn.Module):
    """Four experts, two per token; all are computed, which on this size costs less than sorting tokens."""

    def __init__(self, width: int, num_experts: int = 4, num_chosen: int = 2) -> None:
        super().__init__()
        self.num_chosen = num_chosen
        self.router = nn.Linear(width, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(num_experts, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * width, width) / (2 * width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(self.num_chosen, dim=-1)
        gates = torch.zeros(*x.shape[:-1], len(self.up)).scatter(-1, chosen.indices, chosen.values.softmax(dim=-1))
        hidden = functional.gelu(torch.einsum("blw,ewh->bleh", x, self.up))
        return torch.einsum("bleh,ehw,ble->blw", hidden, self.down, gates)


class Block(nn.Module):
    def __init__(self, width: int, *, moe: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads=2)
        dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp = Experts(width) if moe else dense

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(L.LightningModule):
    def __init__(self, lr: float, *, moe: bool = False, width: int = 32, depth: int = 2, warmup: int = 100) -> None:
        super().__init__()
        self.lr, self.warmup = lr, warmup
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width, moe=moe) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.accuracy = torchmetrics.MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits.argmax(dim=-1).eq(y).float())
        self.log("val_loss", functional.cross_entropy(logits.flatten(0, 1), y.flatten()), prog_bar=True)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def blocks(text: Tensor, *, at_most: int | None = None) -> TensorDataset:
    """Bytes and, for each, the byte that follows, as tuples; spread over the text where not all are taken."""
    count = (len(text) - 1) // LENGTH
    chosen = torch.arange(count) if at_most is None else torch.arange(at_most) * (count // at_most)
    places = chosen[:, None] * LENGTH + torch.arange(LENGTH)
    return TensorDataset(text[places].long(), text[places + 1].long())


def loaders(train: Tensor, validation: Tensor, batch_size: int = 8) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return (
        DataLoader(blocks(train), batch_size, shuffle=True),
        DataLoader(blocks(validation, at_most=256), batch_size=64),
    )
