"""What merging and evaluating take beyond the window: a Trainer with the callback, on the parameters of a 110M Llama.

    python -m benchmarks.memory [--json FILE] [--quick] [--stores device host disk] [--device cuda]

Each row is a process of its own: a run with a snapshot at every second step, and when the window is full three views,
merged one after another and evaluated beside raw by a validation step of a few numbers, so that no activations count.
`beyond` is the most that the process held from before the first snapshot to the end of the merge point, minus what it
is meant to hold: the slots, a scratch slot where raw cannot come back from the newest slot, the accumulator of
`average: block`.

On a CPU that is RssAnon (memory that no file backs), read every half millisecond by a thread; every allocation beyond
64 KiB is a mapping of its own, so that nothing hides in memory freed before. On a GPU it is what torch allocated there.
"""

import argparse
import itertools
import logging
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.measure import machine, new_parser, show, write_json
from benchmarks.parameters import Shapes, llama_shapes
from pretrain_merge import ModelMerging
from pretrain_merge.kernels.weighted_sum import weighted_sum_
from pretrain_merge.stores.store import slot_dtype

MIB = 2**20
# Of one step the mean is the model itself: raw comes back from the slot then, and no scratch slot would be measured.
STEPS_PER_SNAPSHOT = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = {
    "store": "store",
    "average": "average",
    "slot dtype": "slot_dtype",
    "model": "model_mib",
    "window": "window_mib",
    "scratch": "scratch_mib",
    "accumulator": "accumulator_mib",
    "beyond": "beyond_mib",
}


@dataclass(frozen=True)
class Case:
    """One row: where slots lie, what a snapshot is, in which dtype, and of which model."""

    store: str
    average: str
    slot_dtype: str | None
    dtype: str
    window: int
    shapes: Shapes
    device: str
    threads: int


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = options.threads or torch.get_num_threads()
    shapes = llama_shapes(shrink=2 if options.quick else 1)
    cases = [
        Case(store, average, slot, options.dtype, options.window, shapes, device, threads)
        for store, average, slot in itertools.product(
            options.stores, options.averages, [None if name == "same" else name for name in options.slot_dtypes]
        )
    ]
    rows = [_in_a_process(case) for case in track(cases, "a run per row", console=Console(stderr=True), transient=True)]
    print(f"{rows[0]['machine']}; torch {torch.__version__}; sizes in MiB")
    show(f"{options.dtype}, {rows[0]['elements'] / 2**20:.1f} Mi elements, window of {options.window}", rows, COLUMNS)
    write_json(options.json, rows)
    return rows


def _in_a_process(case: Case) -> dict[str, Any]:
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**16))  # read by the C library when a process starts
    context = multiprocessing.get_context("forkserver")  # clean, and the slow imports are made once only
    context.set_forkserver_preload(["lightning.pytorch", "pretrain_merge", "benchmarks.parameters"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, case).result()


def _measure(case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    module = Parameters(case)
    compiler = _compile(module)
    max_steps = case.window * STEPS_PER_SNAPSHOT
    with tempfile.TemporaryDirectory() as folder:
        callback = Measured(
            folder,
            window=case.window,
            every=STEPS_PER_SNAPSHOT,
            merge_every=max_steps,
            views=["sma", "wma", "sma2"],
            forecast="off",  # its means would be views more, and what is counted are these three
            average=case.average,
            store=case.store,
            slot_dtype=case.slot_dtype,
        )
        trainer = pl.Trainer(
            max_steps=max_steps,
            accelerator="gpu" if case.device == "cuda" else case.device,
            devices=1,
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=4,
            val_check_interval=10**6,
            check_val_every_n_epoch=None,
        )
        batches = [{"input_ids": torch.zeros(1, 8, dtype=torch.int64)}] * max(4, max_steps)
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    expected = _expected(case, module)
    meant = sum(expected.values())
    return {
        "store": case.store,
        "average": case.average,
        "slot_dtype": case.slot_dtype or "same",
        "dtype": case.dtype,
        "window": case.window,
        "views": 3,
        "elements": sum(parameter.numel() for parameter in module.parameters()),
        "model_mib": round(_num_bytes(module) / MIB),
        **{f"{name}_mib": round(size / MIB) for name, size in expected.items()},
        "peak_mib": callback.peak / MIB,
        "beyond_mib": (callback.peak - meant) / MIB,
        "compiler_mib": compiler / MIB,
        "measured_by": "torch.cuda" if case.device == "cuda" else "RssAnon",
        "machine": machine(torch.device(case.device)),
        "torch": torch.__version__,
    }


class Parameters(pl.LightningModule):
    """A list of parameters that drift by themselves: no gradients, no optimizer state, no activations."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        # filled, since pages that were never written are not there
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.full(shape, 0.5, dtype=DTYPES[case.dtype])) for shape in case.shapes]
        )

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        torch._foreach_mul_(list(self.weights), 1.01)
        self.optimizers().step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", sum(weight.view(-1)[0] for weight in self.weights).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Measured(ModelMerging):
    """The callback, watched from before its first snapshot to the end of its merge point."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(store_folder=folder, **options)
        self.peak = 0

    def on_train_batch_end(self, trainer: Any, *hook_arguments: Any) -> None:
        if trainer.global_step == 1:
            self.meter = _CudaMeter() if trainer.strategy.root_device.type == "cuda" else RssMeter()
        super().on_train_batch_end(trainer, *hook_arguments)
        if trainer.global_step == trainer.max_steps:
            self.peak = self.meter.stop()
            assert self.last_record is not None
            assert len(self.last_record.views) == len(self.last_record.recipes) == 3


class RssMeter:
    """The most anonymous memory of this process beyond what it had at the start."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._start = self._highest = self._read()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._running = False
        self._thread.join()
        os.close(self._statm)
        return self._highest - self._start

    def _watch(self) -> None:
        while self._running:
            self._highest = max(self._highest, self._read())
            time.sleep(0.0005)

    def _read(self) -> int:
        _, resident, backed_by_files, *_ = os.pread(self._statm, 200, 0).split()
        return (int(resident) - int(backed_by_files)) * os.sysconf("SC_PAGE_SIZE")


class _CudaMeter:
    """The most that torch allocated on the GPU beyond what it had at the start."""

    def __init__(self) -> None:
        self._start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated() - self._start


def _compile(module: nn.Module) -> int:
    """What the kernels' compiler leaves in memory, once per process and whatever the model's size."""
    if not Path("/proc/self/statm").exists():
        return 0
    meter = RssMeter()
    for dtype in (torch.float32, torch.bfloat16):
        tiny = [torch.ones(1, dtype=dtype)]
        for spread in (False, True):
            weighted_sum_(tiny, [tiny, tiny], [0.5, 0.5], spread=spread)
    return meter.stop()


def _expected(case: Case, module: nn.Module) -> dict[str, int]:
    """What a run is meant to hold besides the model, in bytes, on the device that is watched."""
    slot = slot_dtype(DTYPES[case.dtype], case.slot_dtype and getattr(torch, case.slot_dtype))
    elements = sum(parameter.numel() for parameter in module.parameters())
    is_here = case.store == "device" or (case.store == "host" and case.device == "cpu")
    raw_is_in_slot = case.average == "last" and slot == DTYPES[case.dtype]
    return {
        "window": case.window * elements * slot.itemsize if is_here else 0,
        "scratch": 0 if raw_is_in_slot else _num_bytes(module),
        "accumulator": 4 * elements if case.average == "block" else 0,
    }


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("memory", __doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the model, still beyond 64 MiB")
    parser.add_argument("--stores", nargs="+", choices=["device", "host", "disk"], default=["device", "host", "disk"])
    parser.add_argument("--averages", nargs="+", choices=["last", "block"], default=["last", "block"])
    parser.add_argument("--slot-dtypes", nargs="+", choices=["same", "bfloat16"], default=["same", "bfloat16"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    parser.add_argument("--window", type=int, default=3)
    return parser


if __name__ == "__main__":
    main()
