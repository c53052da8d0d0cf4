"""Runs in processes of their own that get a signal from outside while merged weights are being evaluated.

Called as a script with a folder: each scenario's report is `<folder>/<scenario>/report.json`. One process imports the
libraries and forks one process for each run, because importing takes longer than all the runs.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SCENARIOS = {"sigterm": "SIGTERM", "sigint": "SIGINT", "slurm_requeue": "SIGUSR1", "slurm_sigterm": "SIGTERM"}
NUM_BATCHES = 40


def main(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import lightning_models  # noqa: F401 - before the fork

    for scenario, name in SCENARIOS.items():
        own = folder / scenario
        own.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            try:
                report = run(scenario, own)
            except BaseException:
                report = {"traceback": traceback.format_exc()}
            (own / "report.json").write_text(json.dumps(report))
            os._exit(0)
        while not (own / "evaluating").exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.01)
        os.kill(child, getattr(signal, name))
        os.waitpid(child, 0)


def run(scenario: str, folder: Path) -> dict[str, Any]:
    import torch
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning_models import Recorder, Regression, rows, same_bits, trainer, weights

    from pretrain_merge import ModelMerging

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell gave to a process in the background
    if scenario.startswith("slurm"):
        pretend_slurm(folder)
    evaluated: list[bool] = []

    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            evaluated.append(same_bits(weights(self), recorder.run.weights[-1]))
            if self.trainer.global_step == 4 and not evaluated[-1]:
                (folder / "evaluating").touch()
                time.sleep(0.05)

    class Order(Callback):
        """What the exception of a signal finds."""

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            found["exception"] = type(exception).__name__
            found["raw in on_exception"] = same_bits(weights(pl_module), recorder.run.weights[-1])

    found: dict[str, Any] = {"exception": None}
    recorder, module = Recorder(), Module()
    saving = ModelCheckpoint(folder / "kept", filename="at-exception", save_on_exception=True, save_top_k=0)
    merging = ModelMerging(window=2, every=2)
    own = trainer(folder, recorder, Order(), merging, saving, max_steps=8, check_val_every_n_epoch=99)
    callbacks = list(own.callbacks)
    try:
        own.fit(module, rows(40), rows(NUM_BATCHES, seed=1, batch_size=1))
    except BaseException as exception:
        found["raised"] = type(exception).__name__
    checkpoints = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}
    return found | {
        "step": own.global_step,
        "raw at the end": same_bits(weights(module), recorder.run.weights[-1]),
        "callbacks are the user's": own.callbacks == callbacks,
        "merged batches evaluated at step 4": evaluated.index(False) < NUM_BATCHES + 1 and evaluated.count(False),
        "checkpoints": {
            name: {
                "step": checkpoint["global_step"],
                "raw": same_bits(dict(checkpoint["state_dict"]), recorder.run.weights[checkpoint["global_step"] - 1]),
                "callbacks": sorted(checkpoint["callbacks"]),
            }
            for name, checkpoint in checkpoints.items()
        },
        "merges": [
            json.loads(line)["step"] for path in folder.rglob("merges.jsonl") for line in path.read_text().splitlines()
        ],
    }


def pretend_slurm(folder: Path) -> None:
    """The environment in which Lightning sees a SLURM job that requeues itself, with a `scontrol` that takes notes."""
    command = folder / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/scontrol.log"\n')
    command.chmod(0o755)
    os.environ |= {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NAME": "pretraining",
        "SLURM_JOB_ID": "4711",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
