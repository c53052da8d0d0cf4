"""RollingMerger in a loop of accelerate: training untouched, and its own save_state and load_state take the merger."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (the extra huggingface)")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from pretrain_merge import RollingMerger  # noqa: E402


def loop(folder, *, merging=True, resume=None, until=16, save_at=None):
    """Weights, and what was measured."""
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 64).view(16, 4)), batch_size=4, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01), data)
    merger, measured, first = RollingMerger(window=3, every=2, window_folder=folder / "window", keep_windows=2), [], 1
    merger.watch(model, [optimizer])
    accelerator.register_for_checkpointing(merger)
    if resume is not None:
        accelerator.load_state(str(resume))
        first = merger.progress.step + 1

    @torch.no_grad()
    def validate():
        return torch.stack([model(batch).square().mean() for (batch,) in data]).mean().item()

    for step in range(first, until + 1):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 4)).square().mean())
        optimizer.step()
        if merging:
            merger.observe(model, step, lr=0.01)
            if merger.merge_is_due():
                measured.append((step, merger.evaluate(model, validate)))
        if step == save_at:
            accelerator.save_state(str(folder / "checkpoint"))
    merger.close()
    accelerator.free_memory()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), measured


@pytest.mark.filterwarnings("ignore")  # of its loaders
def test_training_is_untouched_and_resumes_exactly(tmp_path):
    without, _ = loop(tmp_path / "without", merging=False)
    whole, measured = loop(tmp_path / "whole")
    assert torch.equal(without, whole)
    assert [step for step, _ in measured] == list(range(4, 17, 2))
    loop(tmp_path / "part", save_at=9, until=9)
    again, rest = loop(tmp_path / "part", resume=tmp_path / "part" / "checkpoint")
    assert torch.equal(whole, again)
    assert rest == measured[-len(rest) :]
    assert len(rest) == 4
