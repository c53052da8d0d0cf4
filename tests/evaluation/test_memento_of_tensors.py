"""A tensor that a hook wrote comes back by its bits in its own memory, whatever its kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from evaluation.moved_objects import Plain, kept, put
from harness.models import same_bits
from torch import Tensor, nn

from pretrain_merge.evaluation.memento import blocks
from pretrain_merge.evaluation.memento import memento as module_under_test


def _frozen() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2), requires_grad=False)


TENSORS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], object]]] = {
    "written": (lambda: torch.zeros(2), lambda t: t.add_(1)),
    "written past its version": (_frozen, lambda t: t.data.add_(1)),
    "NaN": (lambda: torch.full((2,), torch.nan), lambda t: t.zero_()),
    "negative zero": (lambda: torch.zeros(2), lambda t: t.neg_()),
    "resized": (lambda: torch.tensor([]), lambda t: t.resize_(4).fill_(1)),
    "of other memory": (_frozen, lambda t: put(t, "data")(torch.ones(3, dtype=torch.float64))),
    "unfrozen": (_frozen, lambda t: t.requires_grad_(True)),
    "expanded": (lambda: torch.zeros(1).expand(3), lambda t: t[0].add_(1)),
    "sparse": (lambda: torch.eye(2).to_sparse(), lambda t: t._values().add_(1)),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), lambda t: t.values().add_(1)),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), lambda t: t.mul_(1j)),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), lambda t: t.view(torch.uint8).zero_()),
    "inference": (lambda: _inferred(), lambda t: t.detach().add_(1)),
}


@torch.inference_mode()
def _inferred() -> Tensor:
    return torch.zeros(2)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_comes_back_by_its_bits_in_its_memory(kind):
    make, move = TENSORS[kind]
    module = nn.Module()
    held = make()
    module.held = [held]
    before = _seen(held)
    kept(module, lambda module: move(module.held[0]))
    assert module.held[0] is held
    assert same_bits(_seen(held), before)


def _seen(tensor: Tensor) -> Any:
    place = tensor.data_ptr() if tensor.layout == torch.strided else None
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach().clone()
    numbers = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return place, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, numbers.to(torch.float32)


def test_a_graph_that_training_holds_can_still_be_walked_backward():
    module = nn.Module()
    module.scale = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * module.scale).sum()
    kept(module, lambda module: module.scale.add_(1))
    loss.backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def free(tensor):
    tensor.untyped_storage().resize_(0)


def released(tensor):
    """What FSDP2 leaves of a parameter that it gathered: all but the memory."""
    free(tensor)
    return tensor


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["copied", "watched"])
def test_p18_a_tensor_whose_memory_was_released_is_left_alone(limit, monkeypatch, caplog):
    monkeypatch.setattr(module_under_test, "MOST_BYTES", limit)
    strided, imaginary = released(torch.ones(6, 4)[1:, ::2]), released(torch.ones(5, dtype=torch.complex64))
    parameter = nn.Parameter(released(torch.ones(3)))
    whole = Plain(gathered=released(torch.ones(300)), view=strided, odd=imaginary, parameter=parameter)
    kept(whole, lambda item: item.gathered.untyped_storage().resize_(1200))
    for tensor in (strided, imaginary, whole.parameter):
        assert tensor.untyped_storage().nbytes() == 0
    assert "not put back" not in caplog.text


def refill(tensor):
    """Memory of its own again, at another address and with other bits."""
    free(tensor)
    held.append(torch.empty(256))  # whoever asks next finds the old place taken
    tensor.untyped_storage().resize_(1024).fill_(1)


held: list[Tensor] = []


@pytest.mark.parametrize("release", [free, refill])
@pytest.mark.parametrize("kind", ["flat", "strided"])
def test_p18_a_tensor_whose_memory_is_released_meanwhile_gets_its_bits_back(kind, release):
    tensor = torch.arange(256.0) if kind == "flat" else torch.arange(256.0).view(16, 16)[1:, ::2]
    before = tensor.clone()
    kept(Plain(tensor=tensor), lambda item: release(item.tensor))
    assert same_bits(tensor, before)


def test_merged_tensors_keep_the_values_that_the_merger_gave_them():
    module = nn.Linear(2, 2)
    module.view = module.weight.detach()[1:]  # the same memory
    before = module.weight.detach() + 1
    kept(module, lambda module: module.weight.data.copy_(before), merged=[module.weight])
    assert same_bits(module.weight.detach(), before)


@pytest.mark.parametrize("block", [blocks.HostBlock, blocks.DeviceBlock])
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 100_003])
def test_a_tensor_of_any_size_comes_back_bit_by_bit_in_its_memory(size: int, block: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(blocks, "HostBlock", block)  # that of other devices works on any, and is slower here
    whole = torch.arange(float(size + 2), dtype=torch.float64)
    item = Plain(whole=whole, inner=whole[1:-1].float()[: max(1, size - 1)], few=torch.zeros(size, dtype=torch.uint8))
    before = {name: value.clone() for name, value in vars(item).items()}

    def write(item: Any) -> None:
        for value in vars(item).values():
            value.data[-1] += 1  # past its version (P31)

    kept(item, write)
    for name, value in vars(item).items():
        assert same_bits(value, before[name])
