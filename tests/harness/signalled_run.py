"""Runs in processes of their own that get a signal from outside at a merge point.

`main` is called in a process of its own with a folder: each scenario's report is `<folder>/<scenario>/report.json`. It
imports the libraries and forks one process for each run, because importing takes longer than all the runs.
"""

import json
import os
import queue
import signal
import time
import traceback
from pathlib import Path
from typing import Any

# In the validation of a merged model: a long evaluation.
SCENARIOS = {"sigterm": "SIGTERM", "sigint": "SIGINT", "slurm_requeue": "SIGUSR1", "slurm_sigterm": "SIGTERM"}
# Anywhere else: the signal arrives before the moment goes on.
MOMENTS = ("the raw pass", "a merge", "an evaluator", "the writing of a merged model", "the restore")
HELD_SCENARIOS = {f"{signal} in {moment}": (signal, moment) for moment in MOMENTS for signal in ("SIGTERM", "SIGUSR1")}
NUM_BATCHES = 40
_PATIENCE = 60.0  # seconds; a signal takes milliseconds


def main(into: str) -> None:
    folder = Path(into)
    # before the fork: what takes longer than a run
    import torch
    from harness import models  # noqa: F401

    import pretrain_merge.callbacks  # noqa: F401
    from pretrain_merge.kernels.weighted_sum import weighted_sum_

    weighted_sum_([torch.zeros(1)], [[torch.zeros(1)]], [1.0])

    for scenario, name in (SCENARIOS | {key: name for key, (name, _) in HELD_SCENARIOS.items()}).items():
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
        while not (own / "evaluating").exists():
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                break  # its report says why
            time.sleep(0.01)
        else:
            os.kill(child, getattr(signal, name))
            os.waitpid(child, 0)


def run(scenario: str, folder: Path) -> dict[str, Any]:
    import torch
    from harness.models import Recorder, Regression, Witness, rows, same_bits, trainer, weights
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from pretrain_merge import ModelMerging

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell gave to a process in the background
    name, moment = HELD_SCENARIOS.get(scenario, (SCENARIOS.get(scenario), ""))
    if scenario.startswith("slurm") or name == "SIGUSR1":
        pretend_slurm(folder)
    evaluated = Witness()
    at_step_4 = Once(lambda: own.global_step == 4, folder / "evaluating")

    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            evaluated.append(same_bits(weights(self), recorder.run.weights[-1]))
            if moment == "the raw pass":
                at_step_4.wait_for_the_signal()
            if not moment and self.trainer.global_step == 4 and not evaluated[-1]:
                (folder / "evaluating").touch()
                time.sleep(0.05)

    class Order(Callback):
        """What the exception of a signal finds."""

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            found["exception"] = type(exception).__name__
            found["raw in on_exception"] = same_bits(weights(pl_module), recorder.run.weights[-1])

    def evaluator(live: Any) -> dict[str, float]:
        if moment == "an evaluator" and not same_bits(weights(live), recorder.run.weights[-1]):
            at_step_4.wait_for_the_signal()
        return {}

    found: dict[str, Any] = {"exception": None}
    recorder, module = Recorder(), Module()
    saving = ModelCheckpoint(folder / "kept", filename="at-exception", save_on_exception=True, save_top_k=0)
    saved = {"every": 4, "keep": 9} if moment == "the writing of a merged model" else {}
    merging = ModelMerging(window=2, every=2, views=["sma", "wma"], evaluators={"own": evaluator}, save=saved)
    own = trainer(folder, recorder, Order(), merging, saving, max_steps=6, check_val_every_n_epoch=99)
    callbacks = list(own.callbacks)
    pause_in(moment, at_step_4)
    try:
        own.fit(module, rows(40), rows(2 if moment else NUM_BATCHES, seed=1, batch_size=1))
    except BaseException as exception:
        found["raised"] = type(exception).__name__
    checkpoints = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}
    return found | {
        "step": own.global_step,
        "arrived": at_step_4.is_over,
        "raw at the end": same_bits(weights(module), recorder.run.weights[-1]),
        "callbacks are the user's": own.callbacks == callbacks,
        "merged batches evaluated": evaluated.count(False),
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
        "merged": sorted(path.name for path in (folder / "merged").glob("*")),
    }


class Once:
    """A moment at which the run stands still until a signal has arrived, the first time that `when` holds.

    It owns a queue, as what works beside a run does, so an evaluation does not take back that the moment is over.
    """

    def __init__(self, when: Any, sign: Path) -> None:
        self._when, self._sign, self.is_over = when, sign, False
        self.queue = queue.SimpleQueue()

    def wait_for_the_signal(self) -> None:
        from pretrain_merge.runtime import signals

        if self.is_over or not self._when():
            return
        self._sign.touch()
        deadline = time.monotonic() + _PATIENCE
        while not signals.pending() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.is_over = signals.pending()


def pause_in(moment: str, pause: Once) -> None:
    """Make the package stand still in one of its own functions; of this process only."""
    from pretrain_merge.merged_models import whole_weights
    from pretrain_merge.stores.device import DeviceStore

    def followed_by_a_pause(function: Any) -> Any:
        def then_wait(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            pause.wait_for_the_signal()
            return result

        return then_wait

    def after_a_pause(function: Any) -> Any:
        def wait_first(*args: Any, **kwargs: Any) -> Any:
            pause.wait_for_the_signal()
            return function(*args, **kwargs)

        return wait_first

    if moment == "a merge":
        DeviceStore.merge_ = followed_by_a_pause(DeviceStore.merge_)
    if moment == "the writing of a merged model":
        whole_weights.save_file = followed_by_a_pause(whole_weights.save_file)
    if moment == "the restore":
        DeviceStore.read_ = after_a_pause(DeviceStore.read_)


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
