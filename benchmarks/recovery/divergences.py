"""What diverges, and how: at a rate that is too high, or over bytes that are no text; and a run and its control.

This module trains; it knows no files.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.annealing import texts
from benchmarks.annealing.decoder import VOCAB_SIZE, Decoder
from pretrain_merge import SpikeRecovery
from pretrain_merge.demo.corpus import Corpus, TrainingBlocks, ValidationBlocks
from pretrain_merge.demo.fitting import quiet
from pretrain_merge.errors import DivergenceError

BEYOND = 500  # steps after the onset at which a run is judged
_BLOCK_LENGTH, _BATCH, _WARMUP = 64, 8, 50
_MEASURED_AT = range(-100, 1, 20)  # before the end: iterates at a constant rate scatter by more than is told apart
_LOWER = 0.5  # the default of SpikeRecovery
_CLIP = 1.0  # likewise


@dataclass(frozen=True)
class Divergence:
    """One run.

    Attributes:
        mechanism: "rate": too high, with AdamW's usual beta2 and no clipping; "shock": bytes at random, early at a
            rate that is rather high; "grown": the same bytes later, in a run at a good rate that clips by itself.
        family: "dense" or "moe".
        seed: Draws weights, data and the shock.
        lr: After the warm-up, constant.
        beta2: Of AdamW.
        shock: First and last step of the bytes at random, where there are any.
        clips: Whether the run clips its gradients itself from its first step, as all controls do.
        num_steps: By which it must have diverged.
    """

    mechanism: str
    family: str
    seed: int
    lr: float
    beta2: float
    shock: tuple[int, int] | None = None
    clips: bool = False
    num_steps: int = 1500

    @property
    def name(self) -> str:
        return f"{self.mechanism}-{self.family}-{self.seed}"


def _with_shock(mechanism: str, family: str, seed: int, at: int, **options: Any) -> Divergence:
    first = at + 17 * seed  # not at the same distance from a restart point in each run
    return Divergence(mechanism, family, seed, beta2=0.95, shock=(first, first + 39), **options)


_FAMILIES = ("dense", "moe")
ALL = (
    *(Divergence("rate", family, seed, lr=0.3, beta2=0.999) for family in _FAMILIES for seed in range(6)),
    *(_with_shock("shock", family, seed, 400, lr=1e-2) for family in _FAMILIES for seed in range(6)),
    *(_with_shock("grown", family, seed, 1200, lr=3e-3, clips=True) for family in _FAMILIES for seed in range(4)),
)


def measured(divergence: Divergence, **keys: Any) -> dict[str, Any]:
    """Train it with `SpikeRecovery`, and its control to the same step; all that is worth a record.

    The control trains at the rate that the recovered run has at its end, clipped, from its first step. Where it
    diverges itself, it trains at a lower one. The twin of a run with a shock is that run without the shock, clipped
    from the same step on: it tells what the shock cost from what the steps before it cost.

    Args:
        divergence: What is trained.
        keys: Of `SpikeRecovery`, where they are not its defaults.
    """
    corpus = texts.TEXTS["stdlib"]()
    recovery = SpikeRecovery(**keys)
    found: dict[str, Any] = asdict(divergence) | {"keys": keys}
    run, error = _Model(divergence, clip_from=0 if divergence.clips else math.inf), ""
    try:
        _fit(run, corpus, divergence.num_steps, recovery)
    except DivergenceError as raised:
        error = str(raised)
    found |= {"recoveries": [asdict(item) for item in recovery.recoveries], "error": error}
    # one that begins in the steps which are there for others to be judged ends before it can be: it came too late
    if not recovery.recoveries or recovery.recoveries[0].onset > divergence.num_steps:
        return found | {"recoveries": [], "loss": None, "control": None}
    if error:
        return found | {"loss": None, "control": None}
    end = recovery.recoveries[0].onset + BEYOND
    factor = recovery.recoveries[-1].lr_factor
    while True:
        control = _Model(replace(divergence, lr=divergence.lr * factor, shock=None), clip_from=0)
        watching = SpikeRecovery()  # changes nothing until it tells of a divergence
        _fit(control, corpus, end, watching, is_control=True)
        if not watching.recoveries:
            break
        factor *= _LOWER
    found |= {"loss": run.loss_at(end), "control": control.loss_at(end), "end": end, "control_factor": factor}
    if divergence.shock is not None and not divergence.clips:  # else it would be the control once more
        twin = _Model(replace(divergence, shock=None), clip_from=recovery.recoveries[0].step)
        _fit(twin, corpus, end, SpikeRecovery(), is_control=True)
        found["twin"] = twin.loss_at(end)
    return found


def steps(divergence: Divergence, corpus: Corpus) -> Iterator[tuple[float, float]]:
    """Training loss, and norm of the gradient, of each step of the run that nobody takes back."""
    model = _Model(divergence)
    optimizer = torch.optim.AdamW(model.parameters(), lr=divergence.lr, betas=(0.9, divergence.beta2))
    blocks = _blocks(divergence, corpus, divergence.num_steps)
    for step in range(divergence.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = divergence.lr * _warmth(step)
        optimizer.zero_grad()
        batch = [blocks[step * _BATCH + index]["input_ids"] for index in range(_BATCH)]
        loss = model.training_step({"input_ids": torch.stack(batch)}, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        yield loss.item(), norm.item()


def _blocks(divergence: Divergence, corpus: Corpus, num_steps: int) -> TrainingBlocks:
    num_blocks = num_steps * _BATCH
    return TrainingBlocks(corpus.train, block_length=_BLOCK_LENGTH, num_blocks=num_blocks, seed=divergence.seed)


def _warmth(step: int) -> float:
    return min(1.0, (step + 1) / _WARMUP)


class _Model(lightning.LightningModule):
    def __init__(self, divergence: Divergence, clip_from: float = math.inf) -> None:
        super().__init__()
        torch.manual_seed(divergence.seed)
        width = 48 if divergence.family == "dense" else 32
        self._decoder = Decoder(width=width, depth=2, block_length=_BLOCK_LENGTH, family=divergence.family, dropout=0.0)
        self._divergence, self._clip_from = divergence, clip_from
        self.losses: dict[int, float] = {}

    def loss_at(self, end: int) -> float:
        """Mean held-out loss of the last steps."""
        return fmean(self.losses[end + before] for before in _MEASURED_AT)

    def training_step(self, batch: Any, index: int) -> Tensor:
        blocks, first_last = batch["input_ids"], self._divergence.shock
        if first_last is not None and first_last[0] <= index <= first_last[1]:
            generator = torch.Generator().manual_seed(1000 * self._divergence.seed + index)
            blocks = torch.randint(VOCAB_SIZE, blocks.shape, generator=generator)
        loss: Tensor = self._decoder(blocks)
        return loss

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        if self.trainer.global_step >= self._clip_from:
            self.clip_gradients(optimizer, gradient_clip_val=_CLIP, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> Any:
        betas = (0.9, self._divergence.beta2)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._divergence.lr, betas=betas)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmth)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Measuring(lightning.Callback):
    """Held-out loss at every tenth step, and the end of a run that is far enough beyond its onset."""

    def __init__(self, corpus: Corpus, recovery: SpikeRecovery | None) -> None:
        blocks = ValidationBlocks(corpus.validation, block_length=_BLOCK_LENGTH, num_blocks=160)
        self._blocks = torch.stack([blocks[index]["input_ids"] for index in range(len(blocks))])
        self._recovery = recovery

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        recoveries = self._recovery.recoveries if self._recovery is not None else ()
        end = recoveries[0].onset + BEYOND if recoveries else trainer.max_steps
        before = trainer.global_step - end
        if before in _MEASURED_AT:
            pl_module._decoder.eval()
            with torch.no_grad():
                pl_module.losses[trainer.global_step] = float(pl_module._decoder(self._blocks))
            pl_module._decoder.train()
        trainer.should_stop = trainer.should_stop or before == 0


def _fit(module: _Model, corpus: Corpus, num_steps: int, recovery: SpikeRecovery, *, is_control: bool = False) -> None:
    blocks = _blocks(module._divergence, corpus, num_steps + BEYOND)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=num_steps + (0 if is_control else BEYOND), logger=False,
            default_root_dir=folder, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            callbacks=[recovery, _Measuring(corpus, None if is_control else recovery)],
        )  # fmt: skip
        trainer.fit(module, DataLoader(blocks, batch_size=_BATCH))
