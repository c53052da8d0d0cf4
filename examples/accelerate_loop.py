"""A loop with accelerate. Run it a second time, and it goes on from its last checkpoint with the window that it had."""

import itertools
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny_lm import Text, TinyLM
from torch import Tensor

from pretrain_merge import RollingMerger
from pretrain_merge.cadence import Progress

RUN = Path("runs/accelerate")


class Counters:
    """How far the run has come; saved and loaded with the rest."""

    def __init__(self) -> None:
        self.progress = Progress()

    def state_dict(self) -> dict[str, int]:
        return vars(self.progress)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.progress = Progress(**state)


set_seed(0)
accelerator = Accelerator()
text, lm, counters = Text(), TinyLM(), Counters()
model, optimizer, train, validation = accelerator.prepare(
    lm, torch.optim.AdamW(lm.parameters(), lr=lm.lr), text.train_dataloader(), text.val_dataloader()
)
merger = RollingMerger(window=5, every="2.5K tokens", start="25K tokens", window_folder=RUN / "window", keep_windows=2)
merger.watch(model, [optimizer])
accelerator.register_for_checkpointing(merger, counters)
if (RUN / "last").exists():
    accelerator.load_state(str(RUN / "last"))


def loss_of(batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy per token."""
    logits, targets = model(batch["input_ids"][:, :-1]), batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss() -> float:
    """Mean loss over the validation text of all processes, of whatever weights are in the model now."""
    losses = torch.stack([loss_of(batch) for batch in validation])
    return float(accelerator.gather(losses.mean()).mean())


batches = itertools.chain.from_iterable(itertools.repeat(train))
for batch in itertools.islice(batches, 200):
    optimizer.zero_grad()
    accelerator.backward(loss_of(batch))
    optimizer.step()

    tokens = batch["input_ids"].numel() * accelerator.num_processes
    counters.progress = Progress(counters.progress.step + 1, tokens=counters.progress.tokens + tokens)
    merger.observe(model, counters.progress, lr=optimizer.param_groups[0]["lr"])
    if merger.merge_is_due():
        losses = merger.evaluate(model, validation_loss)  # raw weights and random numbers are as before when it ends
        accelerator.print(f"{counters.progress.tokens:7d} tokens  raw {losses['raw']:.4f}  merged {losses['sma']:.4f}")
accelerator.save_state(str(RUN / "last"))
