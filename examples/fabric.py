"""A Lightning Fabric loop with `RollingMerger`, which here counts tokens instead of steps.

Run it a second time, and it goes on from its last checkpoint with the window that it had.
"""

import itertools
from pathlib import Path

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
run = Path("runs/fabric")
merger = RollingMerger(window=5, every="2.5K tokens", start="25K tokens", window_folder=run / "window", keep_windows=2)
merger.watch(model, [optimizer])
state = {"model": model, "optimizer": optimizer, "merger": merger, "step": 0, "tokens": 0}
if (run / "last.ckpt").exists():
    fabric.load(run / "last.ckpt", state)


def loss_of(batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy per token."""
    logits, targets = model(batch["input_ids"][:, :-1]), batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss() -> float:
    """Mean loss over the validation text, of whatever weights are in the model now."""
    return float(torch.stack([loss_of(batch) for batch in validation]).mean())


batches = itertools.chain.from_iterable(itertools.repeat(train))
for batch in itertools.islice(batches, 200):
    optimizer.zero_grad()
    fabric.backward(loss_of(batch))
    optimizer.step()

    state["step"] += 1
    state["tokens"] += batch["input_ids"].numel() * fabric.world_size
    merger.observe(model, Progress(state["step"], tokens=state["tokens"]), lr=optimizer.param_groups[0]["lr"])
    if merger.merge_is_due():
        losses = merger.evaluate(model, validation_loss)  # raw weights and random numbers are as before when it ends
        fabric.print(f"{state['tokens']:7d} tokens  raw {losses['raw']:.4f}  merged {losses['sma']:.4f}")
fabric.save(run / "last.ckpt", state)
