"""(g) Strategies of several ranks on one device: DDP and FSDP2 over NCCL, the callback on and off."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from benchmarks.gpu import workload
from benchmarks.gpu.fitting import LanguageModule, fit
from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from pretrain_merge import ModelMerging


def measure(setting: Setting, report: Report) -> None:
    if setting.predicts:
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    backend = "gloo" if setting.rehearses else "nccl"
    strategies: dict[str, Callable[[], Strategy]] = {
        "DDP": lambda: DDPStrategy(process_group_backend=backend),
        "FSDP2": lambda: ModelParallelStrategy(
            data_parallel_size=1, tensor_parallel_size=1, process_group_backend=backend
        ),
    }
    for name, make in strategies.items():
        _compare(name, backend, make, setting, report)


class _Sharded(LanguageModule):
    """With every layer and the whole model sharded, as FSDP2 is used."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def _compare(name: str, backend: str, make: Callable[[], Strategy], setting: Setting, report: Report) -> None:
    num_steps = 8
    label = f"{name}, {backend}, 1 rank, {num_steps} steps"

    def run(*callbacks: Any) -> Any:
        kind = _Sharded if name == "FSDP2" else LanguageModule
        return fit(
            setting,
            kind(workload.llama_124m(setting)),
            num_steps=num_steps,
            validate_every=4,
            callbacks=callbacks,
            strategy=make(),
        )

    merging = ModelMerging(window=3, every=2, views=["sma"], name=f"on-{name}", breaks={"lr": False})
    off, on = run(), run(merging)
    report("losses and weights are the same bits", label, on.equals(off))
    record = merging.last_record
    report("a merge was measured", label, record is not None and "val_loss" in record.views["sma"])
    if torch.distributed.is_initialized():  # the next strategy makes its own
        torch.distributed.destroy_process_group()
