"""(e) A merge of snapshots in pinned host memory, which pass through the device in pieces, against the link."""

import torch

from benchmarks.gpu import estimates, workload
from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import interleave
from pretrain_merge.stores.host import HostStore

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(setting: Setting, report: Report) -> None:
    shapes = setting.sized(workload.llama_7b(6 * 10**8), workload.llama_7b(1, shrink=128))
    window, elements = setting.sized(6, 3), workload.num_elements(shapes)
    for name, dtype in _DTYPES.items():
        label = f"{name}, N={window}, {elements / 1e6:.3g}M"
        predicted = estimates.link_seconds(setting.hardware, window * elements * dtype.itemsize)
        if setting.predicts:
            report("merge from host", label, None, "s", predicted=predicted)
            continue
        weights = {f"{i}": tensor for i, tensor in enumerate(workload.tensors(shapes, dtype, setting))}
        out, store = [torch.empty_like(tensor) for tensor in weights.values()], HostStore()
        for slot in range(window):
            store.write(slot, weights, [dtype] * len(weights))
        pinned = [torch.empty_like(tensor, device="cpu", pin_memory=not setting.rehearses) for tensor in out]

        def over_link(out: list[torch.Tensor] = out, pinned: list[torch.Tensor] = pinned) -> None:
            for target, source in zip(out, pinned, strict=True):
                target.copy_(source, non_blocking=True)

        def merge(store: HostStore = store, out: list[torch.Tensor] = out) -> None:
            store.merge_(out, range(window), [1 / window] * window)

        timing = interleave(setting, {"merge": merge}, over_link)["merge"]
        report("merge from host", label, timing.seconds, "s", predicted=predicted)
        report("merge from host: share of the link's bandwidth", label, window / timing.ratio, "%")
        store.clear()
