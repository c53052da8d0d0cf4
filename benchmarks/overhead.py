"""What the callback costs a training run: steps per second with and without it, and what a snapshot and a merge cost.

    python -m benchmarks.overhead [--json FILE] [--quick] [--snapshots 3] [--device cuda]

One run of Lightning's own demo Transformer switches the callback off and on in short blocks of steps (off, on, on, off,
...), so that a slow spell of the machine hits both alike. The overhead has two parts: what steps without a snapshot
take longer, as the median over neighbouring blocks, and what a hook takes that makes a snapshot, spread over the steps
between two. As they are added up, a run takes snapshots twice as often as it is charged for, and half the steps tell as
much. "±" is how far the median of the other steps may be off (95%, by the quartiles). Nothing is evaluated. Beside it
stands the share of time that is spent in the callback's hooks: on a CPU the same thing without the noise of whole
steps, on a GPU without what the device does later.

The second table times a training step, a snapshot and a merge in turns, in units of one `copy_` of the model.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos import LightningTransformer
from torch.utils.data import DataLoader

from benchmarks.measure import Action, chosen_device, interleave, machine, new_parser, show, write_json
from pretrain_merge import ModelMerging, RollingMerger

VOCABULARY = 1000
NEVER = 10**9
VARIANTS: dict[str, dict[str, Any]] = {
    "snapshots": {"merge_every": NEVER},
    "snapshots and merges": {"merge_every": None},
    "blocks, every 10th step": {"merge_every": NEVER, "average": "block", "sample_every": 10},
}
OVERHEAD_COLUMNS = {
    "callback": "what",
    "steps/s off": "steps_per_second_without",
    "on": "steps_per_second_with",
    "overhead": "overhead",
    "other steps": "overhead_of_other_steps",
    "quartiles": "quartiles",
    "±": "uncertainty",
    "snapshots": "overhead_of_snapshots",
    "in hooks": "overhead_in_hooks",
    "µs idle": "idle_microseconds",
}
COST_COLUMNS = {"what": "what", "seconds": "seconds", "in copies": "ratio_to_copy", "in steps": "ratio_to_step"}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print tables, write JSON; returns the rows."""
    options = _parser().parse_args(arguments)
    device = chosen_device(options)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"{machine(device)}; torch {torch.__version__}")
    rows = [_overhead(name, device, options) for name in options.variants]
    size = f"{rows[0]['elements'] / 2**20:.1f} Mi parameters, {rows[0]['tokens_per_step']} tokens a step"
    show(f"{size}, a snapshot every {rows[0]['every']} steps", rows, OVERHEAD_COLUMNS)
    costs = _costs(device, options)
    show(f"{size}, window of {costs[0]['window']}", costs, COST_COLUMNS)
    write_json(options.json, [*rows, *costs])
    return [*rows, *costs]


def _overhead(variant: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    every, num_snapshots = (20, 2) if options.quick else (options.every, options.snapshots)
    with tempfile.TemporaryDirectory() as folder:
        callback = Alternating(
            every=every // 2,
            window=10,
            validate=False,
            store="device",
            tokens_per_batch=_num_tokens(options),
            **VARIANTS[variant],
        )
        module = Model()
        trainer = pl.Trainer(
            max_steps=callback.steps_until(num_snapshots),
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, DataLoader(_batches(options, device), batch_size=None))
    pairs = callback.pairs
    step = statistics.median(off for off, _ in pairs)
    others = [on / off - 1 for off, on in pairs]
    quartiles = statistics.quantiles(others, n=4)
    of_snapshots = statistics.median(callback.snapshot_seconds) / every / step
    return {
        "what": variant,
        "kind": "overhead",
        "every": every,
        "steps_per_second_without": 1 / step,
        "steps_per_second_with": 1 / statistics.median(on for _, on in pairs),
        "overhead": statistics.median(others) + of_snapshots,
        "overhead_of_other_steps": statistics.median(others),
        "quartiles": f"{quartiles[0]:+.2%} {quartiles[2]:+.2%}",
        # the notch of a box plot (McGill, Tukey and Larsen 1978)
        "uncertainty": 1.57 * (quartiles[2] - quartiles[0]) / len(others) ** 0.5,
        "overhead_of_snapshots": of_snapshots,
        "overhead_in_hooks": callback.idle_share + of_snapshots,
        "idle_microseconds": 1e6 * statistics.median(callback.idle_seconds),
        "num_snapshots": len(callback.snapshot_seconds),
        "pairs": len(pairs),
        "elements": sum(parameter.numel() for parameter in module.parameters()),
        "tokens_per_step": _num_tokens(options),
        "machine": machine(device),
        "torch": torch.__version__,
    }


class Model(LightningTransformer):
    """Lightning's demo model, without the text that it would download."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY)

    def prepare_data(self) -> None:
        pass


class Alternating(ModelMerging):
    """The callback, switched off and on in blocks of steps, and timed.

    Attributes:
        pairs: Seconds per step of neighbouring blocks, off and on, without a snapshot.
        snapshot_seconds: Of each hook that made a snapshot.
        idle_seconds: Of each hook that made none.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pairs: list[tuple[float, float]] = []
        self.snapshot_seconds: list[float] = []
        self.idle_seconds: list[float] = []
        self._seconds_before_steps = 0.0
        # short, so that most slow spells of the machine are longer than a pair of them
        self._length = max(1, self.config.every // 10)
        self._blocks: list[tuple[bool, bool, float]] = []  # callback on, has a snapshot, seconds
        self._num_steps = 0
        self._num_snapshots_before = 0
        self._block_start = 0.0

    @property
    def idle_share(self) -> float:
        """Seconds in hooks that make no snapshot per second outside of all hooks, with the callback on."""
        idle = self._seconds_before_steps + sum(self.idle_seconds)
        in_hooks = idle + sum(self.snapshot_seconds)
        return idle / (sum(seconds for is_on, _, seconds in self._blocks if is_on) - in_hooks)

    def steps_until(self, num_snapshots: int) -> int:
        """Steps of a run that takes so many snapshots: the block to warm up, and as many off as on."""
        return self._length + 2 * num_snapshots * self.config.every

    def on_before_optimizer_step(self, *hook_arguments: Any) -> None:
        if self._is_on:
            start = time.perf_counter()
            super().on_before_optimizer_step(*hook_arguments)
            self._seconds_before_steps += time.perf_counter() - start

    def on_train_batch_end(self, *hook_arguments: Any) -> None:
        if self._is_on:
            self._timed(*hook_arguments)
        self._num_steps += 1
        if self._num_steps % self._length == 0:
            self._end_block()

    @property
    def _is_on(self) -> bool:
        return self._is_on_in(self._num_steps // self._length)

    @staticmethod
    def _is_on_in(block: int) -> bool:
        # the first one warms up, then off, on, on, off: a steady drift cancels out
        return block > 0 and (block - 1) % 4 in (1, 2)

    def _timed(self, *hook_arguments: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(*hook_arguments)
        merger = self._fits.run.merger if self._fits.run is not None else None
        newest = merger.window.newest if merger is not None else None
        if merger is not None and newest is not None and newest.progress == merger.progress:
            _wait()
            self.snapshot_seconds.append(time.perf_counter() - start)
        else:
            self.idle_seconds.append(time.perf_counter() - start)

    def _end_block(self) -> None:
        _wait()
        now = time.perf_counter()
        block = self._num_steps // self._length - 1
        if block > 0:
            has_snapshot = len(self.snapshot_seconds) > self._num_snapshots_before
            self._blocks.append((self._is_on_in(block), has_snapshot, now - self._block_start))
            if block % 2 == 0:  # the second of a pair: off and on, or on and off
                on, off = sorted(self._blocks[-2:], reverse=True)
                if not on[1]:
                    self.pairs.append((off[2] / self._length, on[2] / self._length))
        self._num_snapshots_before = len(self.snapshot_seconds)
        self._block_start = now


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _costs(device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A training step, a snapshot of its weights, a merge into them and raw back, in turns."""
    window = 3 if options.quick else 10
    module = Model().to(device)
    merger = RollingMerger(window=window, every=1, store="device")
    inputs, targets = _batches(options, device)[0]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def train() -> None:
        optimizer.zero_grad()
        module.training_step((inputs, targets), 0).backward()
        optimizer.step()

    def merge_and_restore() -> None:
        with merger.merged(module, "sma"):
            pass

    def capture() -> None:
        merger.observe(module, merger.progress.step + 1)

    for _ in range(window):
        capture()
    candidates: dict[str, Action] = {
        "training step": train,
        "snapshot": capture,
        "merge and restore": merge_and_restore,
    }
    rounds = 3 if options.quick else 20
    timings = interleave(candidates, _copy_all(module), rounds=rounds, device=device, label="costs")
    return [
        {
            "what": name,
            "kind": "cost",
            "seconds": timing.median,
            "ratio_to_copy": timing.ratio,
            "ratio_to_step": timing.times_slower_than(timings["training step"]),
            "window": window,
            "elements": sum(parameter.numel() for parameter in module.parameters()),
            "tokens_per_step": _num_tokens(options),
            "rounds": rounds,
            "machine": machine(device),
            "torch": torch.__version__,
        }
        for name, timing in timings.items()
    ]


def _copy_all(module: torch.nn.Module) -> Action:
    sources = [parameter.detach() for parameter in module.parameters()]
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


def _batches(options: argparse.Namespace, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = 2 if options.quick else options.batch
    tokens = torch.randint(VOCABULARY, (64, rows, options.length + 1), device=device)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


def _num_tokens(options: argparse.Namespace) -> int:
    return (2 if options.quick else options.batch) * options.length


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("overhead", __doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps only: the figures mean nothing")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--every", type=int, default=100, help="steps between snapshots")
    parser.add_argument("--snapshots", type=int, default=3, help="taken in each run")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=32, help="tokens in a sequence")
    return parser


if __name__ == "__main__":
    main()
