"""A training loop in plain PyTorch: `RollingMerger` keeps the window, the loop does the rest."""

import itertools

import torch
from tiny_lm import Text, TinyLM
from torch import Tensor

from pretrain_merge import RollingMerger

torch.manual_seed(0)
text, model = Text(), TinyLM()
optimizer = torch.optim.AdamW(model.parameters(), lr=model.lr)
merger = RollingMerger(window=5, every="10 steps", start="100 steps", views=["sma", "wsm"])


@torch.no_grad()
def validation_loss() -> float:
    """Mean loss over the validation text, of whatever weights are in the model now."""
    losses: list[Tensor] = [model.loss(batch["input_ids"]) for batch in text.val_dataloader()]
    return float(torch.stack(losses).mean())


batches = itertools.chain.from_iterable(itertools.repeat(text.train_dataloader()))
for step, batch in enumerate(itertools.islice(batches, 200), start=1):
    optimizer.zero_grad()
    model.loss(batch["input_ids"]).backward()
    optimizer.step()

    merger.observe(model, step, lr=optimizer.param_groups[0]["lr"])
    if merger.merge_is_due():
        losses = merger.evaluate(model, validation_loss)  # raw weights and random numbers are as before when it ends
        print(f"step {step:4d}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
