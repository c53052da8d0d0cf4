"""One run of the suite and its annealing branches, under Lightning with `ModelMerging`.

This module knows callbacks and the order of things; what is trained is `setups`' business.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from benchmarks.annealing.optimizers import make_optimizer
from benchmarks.annealing.setups import MERGE_EVERY, Anneal, Setup
from pretrain_merge import ModelMerging
from pretrain_merge.demo.corpus import Corpus
from pretrain_merge.demo.fitting import CheckpointAt, ValidationCurve, fit, quiet
from pretrain_merge.demo.models import LanguageModel, build_model, constant_after_warmup
from pretrain_merge.lr_schedules import shape as lr_shape
from pretrain_merge.records import MergeRecord, read_records

_QUIET = {"logger": False, "enable_progress_bar": False}


class SuiteModel(LanguageModel):
    """The demo's module with the setup's size and optimizer."""

    def __init__(self, setup: Setup, lr_factor: Callable[[int], float]) -> None:
        model = build_model(setup.family, seed=setup.seed, width=setup.width, depth=setup.depth)
        super().__init__(model, peak_lr=setup.peak_lr, lr_factor=lr_factor)
        self._setup = setup

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self._setup, self)
        schedule = LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def merging(setup: Setup) -> list[ModelMerging]:
    """Three ways to watch one run: many snapshots, few snapshots, and few block means; nested spans of each."""
    every, warmup = setup.every, setup.warmup_steps
    sparse = {"every": 6 * every, "start": warmup, "merge_every": 12 * every}
    return [
        ModelMerging(
            name="dense",
            window=37,
            every=every,
            start=warmup,
            merge_every=MERGE_EVERY * every,
            views=[f"sma{number + 1}" for number in (3, 6, 9, 12, 18, 24, 36)],
        ),
        ModelMerging(name="sparse", window=7, views=["sma2", "sma3", "sma4", "sma5", "sma7"], **sparse),
        ModelMerging(name="block", window=6, views=["sma2", "sma3", "sma4", "sma6"], average="block", **sparse),
    ]


def train(setup: Setup, corpus: Corpus, say: Callable[[str], None], *, accelerator: str = "cpu") -> dict[str, Any]:
    """The run, its merges and all its branches; but for `seconds` it depends on the setup and the text alone."""
    started = time.process_time()
    with quiet(), tempfile.TemporaryDirectory() as folder:
        records = _run(setup, corpus, Path(folder), accelerator)
        seconds = {"run": time.process_time() - started}
        say(f"{setup.name}: run {seconds['run']:.0f} s")
        anneals = [
            {**vars(anneal), "loss": _branch(setup, corpus, anneal, Path(folder), accelerator)}
            for anneal in setup.anneals
        ]
    seconds["anneals"] = time.process_time() - started - seconds["run"]
    module = SuiteModel(setup, constant_after_warmup(setup.warmup_steps))
    return {
        "parameters": sum(value.numel() for value in module.parameters()),
        "records": records,
        "anneals": anneals,
        "seconds": seconds,
    }


def _run(setup: Setup, corpus: Corpus, folder: Path, accelerator: str) -> dict[str, list[MergeRecord]]:
    starts = sorted({anneal.start for anneal in setup.anneals})
    module = SuiteModel(setup, constant_after_warmup(setup.warmup_steps))
    checkpoints = [CheckpointAt(start, _checkpoint(folder, start)) for start in starts]
    callbacks = [*merging(setup), *checkpoints]
    fit(setup, corpus, module, callbacks=callbacks, default_root_dir=folder, accelerator=accelerator, **_QUIET)
    return {path.parent.name: read_records(path) for path in sorted(folder.glob("*/merges.jsonl"))}


def _branch(setup: Setup, corpus: Corpus, anneal: Anneal, folder: Path, accelerator: str) -> float:
    """Validation loss at the branch's end."""
    end, curve = anneal.start + anneal.steps, ValidationCurve(None)
    fit(
        setup,
        corpus,
        SuiteModel(setup, _anneals(setup, anneal)),
        first_step=anneal.start,
        last_step=end,
        data_seed=setup.seed if anneal.order == 0 else 1000 + anneal.order,
        ckpt_path=_checkpoint(folder, anneal.start),
        callbacks=[curve],
        default_root_dir=folder,
        accelerator=accelerator,
        check_val_every_n_epoch=None,
        val_check_interval=end,
        **_QUIET,
    )
    return curve.values[end]


def _anneals(setup: Setup, anneal: Anneal) -> Callable[[int], float]:
    curve = lr_shape(anneal.shape)

    def factor(step: int) -> float:
        return curve(min(1.0, max(0.0, (step - anneal.start) / anneal.steps)))

    return factor


def _checkpoint(folder: Path, start: int) -> Path:
    return folder / f"step-{start:08d}.ckpt"
