"""What it costs to put a run's objects back, beside an evaluation of the demo model, in turns in one run.

    python -m benchmarks.evaluation [--json FILE] [--quick] [--rounds 20]

A Trainer trains the demo model for three steps. Then an evaluation of it, the memento of everything that hooks can
reach, and putting it back (where nothing changed, as mostly) are timed in turns, in units of the evaluation. A merge of
V views takes one memento and puts it back V + 1 times, so its share of each of the V + 1 evaluations is
memento / (V + 1) + putting back.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.measure import chosen_device, interleave, machine, new_parser, show, write_json
from pretrain_merge.demo.corpus import ValidationBlocks, load_corpus
from pretrain_merge.demo.experiment import Experiment
from pretrain_merge.demo.models import constant_after_warmup, language_model
from pretrain_merge.evaluation import evaluate
from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.runtime.log import WarnOnce

_NUM_VIEWS = 3  # of the demo's configuration
_COLUMNS = {"what": "what", "milliseconds": "milliseconds", "of an evaluation": "share"}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = chosen_device(options)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    timed = _Timed(rounds=2 if options.quick else options.rounds)
    experiment = Experiment(num_validation_blocks=16 if options.quick else Experiment.num_validation_blocks)
    blocks = ValidationBlocks(
        load_corpus().validation, block_length=experiment.block_length, num_blocks=experiment.num_validation_blocks
    )
    data = DataLoader(blocks, 64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=3,
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            callbacks=[timed],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(language_model(experiment, constant_after_warmup(2)), data, data)
    show(f"{machine(device)}; {timed.num_states} objects kept", timed.rows, _COLUMNS)
    write_json(options.json, timed.rows)
    return timed.rows


class _Timed(pl.Callback):
    def __init__(self, *, rounds: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.num_states = 0
        self._rounds = rounds

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != trainer.max_steps:
            return
        merged = list(pl_module.parameters())
        parts = evaluate.parts_of(trainer, pl_module)

        def take() -> Memento:
            return Memento(parts, merged=merged, notices=WarnOnce())

        with evaluate.isolated(trainer, pl_module, merged=merged) as measure:
            memento = take()
            timings = interleave(
                {"memento": take, "putting back": memento.put_back},
                lambda: measure("raw"),
                rounds=self._rounds,
                device=pl_module.device,
                label="evaluation",
            )
        self.num_states = memento.num_kept  # not inside: it would be put back
        common = {
            "rounds": self._rounds,
            "elements": sum(parameter.numel() for parameter in merged),
            "machine": machine(pl_module.device),
            "torch": torch.__version__,
        }
        rows = {name: {"milliseconds": 1e3 * timing.median, "share": timing.ratio} for name, timing in timings.items()}
        memento_costs, putting_back = rows.values()
        rows["per evaluation"] = {
            key: cost / (_NUM_VIEWS + 1) + putting_back[key] for key, cost in memento_costs.items()
        }
        self.rows = [{"what": name, **row, **common} for name, row in rows.items()]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("evaluation", __doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds only: the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=20)
    return parser


if __name__ == "__main__":
    main()
