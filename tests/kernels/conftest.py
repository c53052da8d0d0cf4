"""The backends that the contract is tested on, and where their tensors live."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pretrain_merge.kernels.weighted_sum import Backend, Spread, weighted_sum_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class BackendUnderTest(NamedTuple):
    name: Backend
    device: str
    longest: int  # elements of the longest tensor worth merging: enough for several items, blocks and threads

    def merge(
        self,
        out: Sequence[Tensor],
        snapshots: Sequence[Sequence[Tensor]],
        coefficients: Sequence[float],
        *,
        spread: bool = False,
    ) -> Spread | None:
        return weighted_sum_(out, snapshots, coefficients, spread=spread, backend=self.name)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> BackendUnderTest:
    if request.param == "cpu" and importlib.util.find_spec("llvmlite") is None:
        pytest.skip("llvmlite is not installed")
    if request.param != "cuda":
        return BackendUnderTest(request.param, "cpu", (1 << 19) + 4321)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if INTERPRETED:
        return BackendUnderTest("cuda", "cpu", 2500)
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here; test_cuda.py runs these tests in Triton's interpreter")
    return BackendUnderTest("cuda", "cuda", (1 << 19) + 4321)


@pytest.fixture
def make(backend: BackendUnderTest) -> Callable[..., Tensor]:
    """Weights like a trained model's: of either sign, over several orders of magnitude, on the backend's device."""
    generator = torch.Generator().manual_seed(2505)

    def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))
        return values.to(dtype).to(backend.device)

    return weights
