"""(b) The merge kernel against the copy's bandwidth, beside what else people do: N = 2, 10, 32, fp32 and bf16."""

import gc
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import estimates, workload
from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Action, interleave
from pretrain_merge.kernels.weighted_sum import weighted_sum_

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHARE_OF_MEMORY = 0.35  # for snapshots and output; a stack of them needs as much again
_FLAT = 2**27  # elements of the one tensor

Lists = list[list[Tensor]]


class _Case(NamedTuple):
    dtype: str
    num_snapshots: int
    shapes: workload.Shapes
    name: str


def measure(setting: Setting, report: Report) -> None:
    for case in _cases(setting):
        label = f"{case.dtype}, N={case.num_snapshots}, {case.name}"
        elements, itemsize = workload.num_elements(case.shapes), _DTYPES[case.dtype].itemsize
        predicted = estimates.merge_seconds(
            setting.hardware, elements, itemsize=itemsize, num_snapshots=case.num_snapshots
        )
        if setting.predicts:
            report("merge", label, None, "s", predicted=predicted)
            continue
        _measure(case, label, predicted, setting, report)
        gc.collect()  # the closures hold the tensors
        if not setting.rehearses:
            torch.cuda.empty_cache()


def _cases(setting: Setting) -> Iterator[_Case]:
    free = 80 * 10**9 if setting.predicts else setting.free_bytes()
    for dtype in _DTYPES:
        for number in setting.sized((2, 10, 32), (2, 10)):
            most = int(_SHARE_OF_MEMORY * free) // ((number + 1) * _DTYPES[dtype].itemsize)
            flat = setting.sized(min(_FLAT, most), 3000)
            yield _Case(dtype, number, [(flat,)], f"flat, {flat / 2**20:.3g} Mi")
            shapes = setting.sized(workload.llama_7b(most), workload.llama_7b(1, shrink=256))
            layers = sum(len(shape) == 1 for shape in shapes) // 2
            yield _Case(dtype, number, shapes, f"7B Llama, layers: {layers}, tensors: {len(shapes)}")


def _measure(case: _Case, label: str, predicted: float, setting: Setting, report: Report) -> None:
    *snapshots, out = [
        workload.tensors(case.shapes, _DTYPES[case.dtype], setting) for _ in range(case.num_snapshots + 1)
    ]
    coefficients = [1 / case.num_snapshots] * case.num_snapshots

    def ours(*, spread: bool) -> Action:
        return lambda: weighted_sum_(out, snapshots, coefficients, backend="cuda", spread=spread)

    candidates = {"merge": ours(spread=False), "merge with spread": ours(spread=True)} | _others(
        out, snapshots, coefficients, setting
    )
    timings = interleave(setting, candidates, lambda: torch._foreach_copy_(out, snapshots[0]))
    copies = (case.num_snapshots + 1) / 2  # of one read and one write each
    num_bytes = (case.num_snapshots + 1) * workload.num_elements(case.shapes) * _DTYPES[case.dtype].itemsize
    for name, timing in timings.items():
        if name.startswith("merge"):
            report(name, label, timing.seconds, "s", predicted=predicted)
        report(
            f"{name}: share of the copy's bandwidth",
            label,
            copies / timing.ratio,
            "%",
            at_least=setting.sized(0.85, None) if name == "merge" else None,
            seconds=timing.seconds,
            bytes_per_second=num_bytes / timing.seconds,
        )


def _others(out: list[Tensor], snapshots: Lists, coefficients: list[float], setting: Setting) -> dict[str, Action]:
    others = {"foreach chain": _foreach_chain(out, snapshots, coefficients), "stack().mean": _stack(out, snapshots)}
    if len(out) == 1:  # one graph for a list of hundreds of tensors times N would take the whole time to compile
        others["torch.compile"] = _compiled(out, snapshots, coefficients, setting)
    return others


def _foreach_chain(out: list[Tensor], snapshots: Lists, coefficients: list[float]) -> Action:
    """One multi-tensor operation per snapshot, in float32."""

    @torch.no_grad()
    def chain() -> None:
        total = out if out[0].dtype is torch.float32 else [tensor.float() for tensor in out]
        torch._foreach_copy_(total, snapshots[0])
        torch._foreach_mul_(total, coefficients[0])
        for snapshot, coefficient in zip(snapshots[1:], coefficients[1:], strict=True):
            torch._foreach_add_(total, snapshot, alpha=coefficient)
        if total is not out:
            torch._foreach_copy_(out, total)

    return chain


def _stack(out: list[Tensor], snapshots: Lists) -> Action:
    """In the weights' own dtype, tensor by tensor."""

    @torch.no_grad()
    def stack() -> None:
        for target, *sources in zip(out, *snapshots, strict=True):
            torch.mean(torch.stack(sources), dim=0, out=target)

    return stack


def _compiled(out: list[Tensor], snapshots: Lists, coefficients: list[float], setting: Setting) -> Action:
    """The sum written out and compiled for this N."""

    def merge(target: Tensor, sources: list[Tensor]) -> None:
        total = coefficients[0] * sources[0].float()
        for source, coefficient in zip(sources[1:], coefficients[1:], strict=True):
            total = total + coefficient * source.float()
        target.copy_(total)

    compiled = torch.compile(merge, backend=setting.compiler, dynamic=False)

    @torch.no_grad()
    def run() -> None:
        compiled(out[0], [snapshot[0] for snapshot in snapshots])

    return run
