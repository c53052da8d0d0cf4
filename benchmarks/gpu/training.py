"""(d) A 124M Llama under bf16-mixed and `torch.compile`, the callback on and off: the same bits, and at what cost.

One compiled model is trained again and again from the same weights, so that every graph beyond those of the first fit
was compiled for the callback's sake.
"""

import statistics
from typing import Any

import torch

from benchmarks.gpu import estimates, workload
from benchmarks.gpu.alternating import Alternating
from benchmarks.gpu.fitting import Fit, LanguageModule, fit
from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from pretrain_merge import ModelMerging, RollingMerger


def measure(setting: Setting, report: Report) -> None:
    elements = workload.elements_of_124m(setting)
    label = f"{elements / 1e6:.3g}M, bf16-mixed, compiled"
    if setting.predicts:
        _predict(elements, label, setting, report)
        return
    # as far as torch has deterministic kernels: without, two runs of the same program differ
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else new memory is written twice
    run = _Runs(setting)
    num_steps, every = setting.sized((300, 30), (12, 2))
    off = run(num_steps, [])
    on = run(num_steps, [_merging(every, setting, store="device")])
    _compare(off, on, lambda: run(num_steps, []), label, report)
    window_bytes = min(10, num_steps // every) * elements * 4
    extra = on.peak_bytes - off.peak_bytes - window_bytes
    predicted = estimates.plan_of(setting.hardware, elements).scratch_bytes / 2**20
    report("peak memory beyond window", label, extra / 2**20, "MiB", at_most=64, predicted=predicted)
    report("recompilations", label, on.graphs, at_most=0)
    report("steps per second, callback off", label, 1 / statistics.median(off.seconds), "/s")
    report("steps per second, callback on", label, 1 / statistics.median(on.seconds), "/s")
    # A capture is still on its way to the host while its step is evaluated.
    shorter = setting.sized(90, 6)
    beside = run(shorter, [_merging(every, setting, store="host")])
    report("evaluation while captures run: the same losses", label, beside.equals(off))
    report("evaluation while captures run: recompilations", label, beside.graphs, at_most=0)
    _overhead(run, label, setting, report)


def _predict(elements: int, label: str, setting: Setting, report: Report) -> None:
    plan = estimates.plan_of(setting.hardware, elements)
    report("peak memory beyond window", label, None, "MiB", predicted=plan.scratch_bytes / 2**20)
    report("seconds of a snapshot, every 100 steps", label, None, "s", predicted=plan.costs["capture"].seconds)


def _compare(off: Fit, on: Fit, again: Any, label: str, report: Report) -> None:
    same = on.equals(off)
    report("losses and weights are the same bits", label, same)
    if not same:  # is it the callback, or a kernel that is not deterministic?
        report("  two runs without the callback are the same bits", label, again().equals(off))


class _Runs:
    """Fits of one compiled model, each from the same weights and the same random numbers.

    Attributes:
        model: The model, not compiled; it shares its weights with the compiled one.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        model = workload.llama_124m(setting).to(setting.device)
        self._start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.model = model
        self._compiled = torch.compile(model, backend=setting.compiler)

    def __call__(self, num_steps: int, callbacks: list[Any]) -> Fit:
        self.model.load_state_dict(self._start)
        torch.manual_seed(1)
        every = self._setting.sized(100, 4)
        return fit(
            self._setting,
            LanguageModule(self._compiled),
            num_steps=num_steps,
            callbacks=callbacks,
            validate_every=every if num_steps >= every else None,
            precision="bf16-mixed",
        )


def _merging(every: int, setting: Setting, *, store: str) -> ModelMerging:
    return ModelMerging(
        window=10,
        every=every,
        merge_every=every * setting.sized(3, 2),
        views=["sma"],
        store=store,
        name=f"on-{store}",
        breaks={"lr": False},
    )


def _overhead(run: _Runs, label: str, setting: Setting, report: Report) -> None:
    """What 100 steps with one snapshot take longer: the idle hooks of every step, and the snapshot."""
    block, num_blocks = setting.sized((10, 41), (1, 9))
    callback = Alternating(block, setting, window=10, every=100, validate=False, store="device", name="alternating")
    run(block * num_blocks, [callback])
    step = statistics.median(off for off, _ in callback.pairs) / block
    idle = statistics.median(on / off - 1 for off, on in callback.pairs)
    merger = RollingMerger(window=2, every=1, store="device")
    seconds = [setting.seconds(lambda: merger.observe(run.model, merger.progress.step + 1)) for _ in range(9)]
    snapshot = statistics.median(seconds)
    elements = workload.elements_of_124m(setting)
    cost = estimates.plan_of(setting.hardware, elements, step_seconds=step).costs["capture"]
    report("seconds of a snapshot, every 100 steps", label, snapshot, "s", predicted=cost.seconds)
    overhead = idle + snapshot / (100 * step)
    report(
        "training slow-down, a snapshot every 100 steps",
        label,
        overhead,
        "%",
        at_most=setting.sized(0.002, None),
        idle=idle,
        predicted=cost.share,
    )
