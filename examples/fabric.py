"""A Lightning Fabric loop with `RollingMerger`, which here counts tokens instead of steps."""

import itertools

import lightning as L
import torch
from tiny_lm import Text, TinyLM
from torch import Tensor

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress

fabric = L.Fabric(devices=1)
fabric.launch()
fabric.seed_everything(0)

text, lm = Text(), TinyLM()
model, optimizer = fabric.setup(lm, torch.optim.AdamW(lm.parameters(), lr=lm.lr))
train, validation = fabric.setup_dataloaders(text.train_dataloader(), text.val_dataloader())
merger = RollingMerger(window=5, every="2.5K tokens", start="25K tokens")


def loss_of(batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy per token."""
    logits, targets = model(batch["input_ids"][:, :-1]), batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss() -> float:
    """Mean loss over the validation text, of whatever weights are in the model now."""
    return float(torch.stack([loss_of(batch) for batch in validation]).mean())


tokens = 0
batches = itertools.chain.from_iterable(itertools.repeat(train))
for step, batch in enumerate(itertools.islice(batches, 200), start=1):
    optimizer.zero_grad()
    fabric.backward(loss_of(batch))
    optimizer.step()

    tokens += batch["input_ids"].numel() * fabric.world_size
    merger.observe(model, Progress(step, tokens=tokens), lr=optimizer.param_groups[0]["lr"])
    if merger.merge_is_due():
        raw = validation_loss()
        with merger.merged(model, "sma"):  # the raw weights are back when the block ends
            merged = validation_loss()
        fabric.print(f"{tokens:7d} tokens  raw {raw:.4f}  merged {merged:.4f}")
