"""The suite's optimizers: Muon's products by a faster way are Muon's products."""

import torch
from torch import Tensor
from torch.optim import Muon

from benchmarks.annealing.optimizers import WideProducts

_LR = 0.1


def test_muon_steps_as_far_from_the_exact_step_as_with_its_own_products():
    gradient = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    own = _stepped(gradient)
    with WideProducts():
        wide = _stepped(gradient)
    exact = -_LR * _orthogonalised(gradient.double())
    own_error, wide_error = ((step - exact).norm() / exact.norm() for step in (own, wide))
    assert 0 < wide_error < 1.1 * own_error < 0.05


def test_only_products_in_bfloat16_are_taken_another_way():
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = matrix @ matrix
    with WideProducts():
        assert torch.equal(matrix @ matrix, expected)
        assert (matrix.bfloat16() @ matrix.bfloat16()).dtype == torch.bfloat16


def _stepped(gradient: Tensor) -> Tensor:
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    Muon([weight], lr=_LR, weight_decay=0.0, momentum=0.0).step()
    return weight.detach()


def _orthogonalised(matrix: Tensor) -> Tensor:
    """Muon's quintic iteration in float64."""
    found = matrix / matrix.norm()
    for _ in range(5):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found
