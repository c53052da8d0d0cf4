"""(f) CUDA graphs, which write to the addresses they were captured with, and `channels_last` weights."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.gpu.results import Report
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Action
from pretrain_merge import RollingMerger


def measure(setting: Setting, report: Report) -> None:
    if setting.predicts:
        return
    torch.backends.cudnn.deterministic = True
    with_merges, merged_once = _train(setting, merges=True)
    without, _ = _train(setting, merges=False)
    report("CUDA graph: weights are the same bits with merges", "4 replays beside each", with_merges == without)
    report("CUDA graph: a merge between replays is the mean", "", merged_once)
    report("channels_last: merged as the mean, strides kept", "", _merges_channels_last(setting))


def _train(setting: Setting, *, merges: bool) -> tuple[list[bytes], bool]:
    """Twelve replays of one captured training step; between some of them a merge comes and goes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(setting.device)
    step = _captured_step(model, setting)
    merger = RollingMerger(window=3, every=1, store="device")
    snapshots: list[list[Tensor]] = []
    is_mean = True
    for number in range(1, 13):
        step()
        if not merges:
            continue
        held = [parameter.detach().clone() for parameter in model.parameters()]
        merger.observe(model, number)
        snapshots = [*snapshots[-2:], held]
        if number % 4 == 0:
            addresses = [parameter.data_ptr() for parameter in model.parameters()]
            with merger.merged(model, "sma"):
                is_mean &= all(
                    _is_mean_of(parameter, [snapshot[row] for snapshot in snapshots])
                    for row, parameter in enumerate(model.parameters())
                )
            is_mean &= addresses == [parameter.data_ptr() for parameter in model.parameters()]
    return [parameter.detach().cpu().numpy().tobytes() for parameter in model.parameters()], is_mean


def _captured_step(model: nn.Module, setting: Setting) -> Action:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=not setting.rehearses)
    inputs = torch.randn(32, 64, device=setting.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (model(inputs) - inputs).square().mean().backward()
        optimizer.step()

    if setting.rehearses:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: gradients and state must exist before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _merges_channels_last(setting: Setting) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(setting.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    merger, snapshots = RollingMerger(window=4, every=1, store="device"), []
    for number in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        merger.observe(model, number)
        snapshots.append(copy.deepcopy(model))
    strides = [parameter.stride() for parameter in model.parameters()]
    with merger.merged(model, "sma"):
        merged = [parameter.detach().clone() for parameter in model.parameters()]
    return [parameter.stride() for parameter in model.parameters()] == strides and all(
        _is_mean_of(tensor, [list(snapshot.parameters())[row] for snapshot in snapshots])
        for row, tensor in enumerate(merged)
    )


def _is_mean_of(merged: Tensor, snapshots: list[Tensor]) -> bool:
    """To a few roundings of float32, against float64."""
    exact = torch.stack([snapshot.detach().double() for snapshot in snapshots])
    allowed = 2 * (len(snapshots) + 2) * 2.0**-24 * exact.abs().mean(dim=0)
    return bool(((merged.detach().double() - exact.mean(dim=0)).abs() <= allowed).all())
