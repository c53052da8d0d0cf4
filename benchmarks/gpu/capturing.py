"""(c) A snapshot to the device, to pinned host memory beside the next training step, and to the disk."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import estimates, workload
from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Action, interleave
from pretrain_merge.parameters import all_finite
from pretrain_merge.plan import Cost
from pretrain_merge.stores.device import DeviceStore
from pretrain_merge.stores.disk import DiskStore
from pretrain_merge.stores.host import HostStore
from pretrain_merge.stores.store import Store

Model = dict[str, Tensor]


def measure(setting: Setting, report: Report) -> None:
    elements = workload.elements_of_124m(setting)
    label = f"float32, {elements / 1e6:.3g}M"
    plans = {
        store: estimates.plan_of(setting.hardware, elements, store=store).costs["capture"]
        for store in ("device", "host", "disk")
    }
    if setting.predicts:
        for store, cost in plans.items():
            report(f"capture to {store}, finite check included", label, None, "s", predicted=cost.seconds)
            beside = sum(move.seconds for move in cost.beside)
            report(f"capture to {store}, beside the steps", label, None, "s", predicted=beside)
        return
    module = workload.llama_124m(setting).to(setting.device)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    step = _training_step(module, setting)
    _to_device(weights, label, plans["device"].seconds, setting, report)
    _to_host(weights, step, label, plans["host"].beside[0].seconds if plans["host"].beside else None, setting, report)
    _to_disk(weights, step, label, plans["disk"], setting, report)


def _to_device(weights: Model, label: str, predicted: float, setting: Setting, report: Report) -> None:
    store, tensors = DeviceStore(), list(weights.values())
    targets = [torch.empty_like(tensor) for tensor in tensors]

    def with_check() -> None:
        all_finite(tensors)
        _write(store, weights)

    candidates: dict[str, Action] = {"capture": lambda: _write(store, weights), "check": with_check}
    timings = interleave(setting, candidates, lambda: torch._foreach_copy_(targets, tensors))
    at_least = setting.sized(0.9, None)
    report(
        "capture to device: share of the copy's bandwidth", label, 1 / timings["capture"].ratio, "%", at_least=at_least
    )
    report("capture to device, finite check included", label, timings["check"].seconds, "s", predicted=predicted)


def _to_host(
    weights: Model, step: Action, label: str, predicted: float | None, setting: Setting, report: Report
) -> None:
    store = HostStore()
    _write(store, weights)  # pins its memory, once
    alone = _median(lambda: setting.seconds(lambda: _write(store, weights)), setting)
    plain, beside = _steps_beside(store, weights, step, setting)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    report(
        "capture to host, nothing beside it", label, alone, "s", predicted=predicted, bytes_per_second=num_bytes / alone
    )
    report("training step", label, plain, "s")
    hidden = 1 - (beside - plain) / alone
    report("capture to host: hidden behind the next step", label, hidden, "%", at_least=setting.sized(0.95, None))
    store.clear()


def _to_disk(weights: Model, step: Action, label: str, cost: Cost, setting: Setting, report: Report) -> None:
    store = DiskStore(setting.folder / "slots")
    _write(store, weights)
    plain, beside = _steps_beside(store, weights, step, setting)
    report("capture to disk: what the next step takes longer", label, beside - plain, "s", predicted=cost.seconds)
    # a capture waits for the disk that still writes the last one
    one_by_one = _median(lambda: setting.seconds(lambda: _write(store, weights)), setting)
    beside_moves = sum(move.seconds for move in cost.beside)
    report("capture to disk, one after another", label, one_by_one, "s", predicted=beside_moves)
    store.clear()


def _steps_beside(store: Store, weights: Model, step: Action, setting: Setting) -> tuple[float, float]:
    """Seconds of a training step alone, and of a capture with the step that follows it, in turns."""
    plain, beside = [], []

    def captured_step() -> None:
        _write(store, weights)
        step()

    for _ in range(setting.sized(12, 2)):
        plain.append(setting.seconds(step))
        beside.append(setting.seconds(captured_step))
    return statistics.median(plain), statistics.median(beside)


def _training_step(module: torch.nn.Module, setting: Setting) -> Action:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    tokens = workload.Batches(setting, 1)[0]["input_ids"].to(setting.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16):
            module(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    return step


def _write(store: Store, weights: Model) -> None:
    store.write(0, weights, [tensor.dtype for tensor in weights.values()])


def _median(measured: Callable[[], float], setting: Setting) -> float:
    return statistics.median(measured() for _ in range(setting.sized(7, 2)))
