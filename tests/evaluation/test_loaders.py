"""Validation loaders read a second time: the same batches, and nothing of the user's moves."""

import os
import random
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from harness.models import AugmentedRows, Documents, Rows, checksum, same_bits
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, RandomSampler, Sampler, Subset

from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import loaders
from pretrain_merge.evaluation.loaders import Fingerprints, RepeatedLoaders
from pretrain_merge.evaluation.memento import Memento
from pretrain_merge.runtime.log import WarnOnce


def combined(*given: Any, mode: str = "sequential") -> CombinedLoader:
    return CombinedLoader(list(given), mode)


class Repeated(RepeatedLoaders):
    """Loaders whose state is put back after each pass and at the end, as `evaluate.isolated` does."""

    def __enter__(self) -> "Repeated":
        self.memento = Memento({"loaders": self.loaders}, notices=WarnOnce())
        return self

    def __exit__(self, *_: object) -> None:
        self.memento.put_back()

    def read(self) -> list[Any]:
        """One full pass, with Lightning's own iteration."""
        loader = self.combined(on_batch=lambda: None)
        loader.limits = list(self.max_batches)
        found = [batch for batch, _, _ in loader]
        loader.reset()  # as Lightning's loop does when it is torn down
        self.end_pass()
        self.memento.put_back()
        return found


def repeated(*given: Any, **options: Any) -> Repeated:
    return Repeated(combined(*given), [float("inf")] * len(given), **options)


class _Batches:
    """A loader that is no DataLoader."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((2,), float(index)) for index in range(3))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Rows(10), 4),
        lambda: DataLoader(Documents(10), 4, shuffle=True),
        lambda: DataLoader(Rows(10), 4, sampler=RandomSampler(Rows(10), generator=torch.Generator().manual_seed(3))),
        lambda: DataLoader(Subset(ConcatDataset([Rows(6), Rows(6, seed=2)]), range(9)), 4, num_workers=1),
        lambda: _Batches(),
        lambda: DataLoader(Rows(10), None),
    ],
)
def test_every_pass_reads_the_same_batches(loader):
    with repeated(loader()) as own:
        torch_state = torch.get_rng_state()
        passes = []
        for _ in range(3):
            torch.set_rng_state(torch_state)  # global generators are the caller's to keep
            passes.append([checksum(batch) for batch in own.read()])
    assert passes[0] == passes[1] == passes[2]
    assert len(passes[0]) >= 3


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size", "max_size_cycle"])
def test_loaders_are_combined_as_the_user_combined_them(mode):
    given = combined(DataLoader(Rows(8), 4), DataLoader(Rows(12, seed=1), 4), mode=mode)
    expected = [batch for batch, _, _ in given]
    with Repeated(given, [3, 3]) as own:
        found = own.read()
    assert len(found) == len(expected)
    assert same_bits(_plain(found), _plain(expected))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_limits_are_those_of_the_trainer():
    with Repeated(combined(DataLoader(Rows(20), 4), DataLoader(Rows(20), 4)), [2, 1]) as own:
        assert [len(own.read()) for _ in range(2)] == [3, 3]
        assert own.num_batches == 3
    assert repeated(DataLoader(Rows(4))).num_batches is None


def test_other_batches_are_an_error_that_names_the_loader_and_the_batch(monkeypatch):
    class Moves(Rows):
        def __getitem__(self, index: int) -> Any:
            os.environ["ROWS_READ"] = str(int(os.environ.get("ROWS_READ", 0)) + 1)  # which is not put back
            return super().__getitem__(index)[0] + (int(os.environ["ROWS_READ"]) > 12), torch.zeros(1)

    monkeypatch.setenv("ROWS_READ", "0")
    with repeated(DataLoader(Rows(8), 4), DataLoader(Moves(8), 4)) as own:
        own.read()
        with pytest.raises(EvaluationError) as error:
            own.read()
    for piece in ("validation loader 1", "batch 3 of this pass is another", "seed its random choices by index"):
        assert piece in str(error.value)


@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 3)])
def test_another_number_of_batches_is_an_error(first, second):
    fingerprints = Fingerprints()
    for index in range(first):
        fingerprints.check(0, torch.tensor(index))
    fingerprints.end_pass()
    with pytest.raises(EvaluationError, match=r"raw and merged weights were given other batches"):  # noqa: PT012
        for index in range(second):
            fingerprints.check(0, torch.tensor(index))
        fingerprints.end_pass()


def jagged(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(length, 2) for length in lengths], layout=torch.jagged)


@dataclass
class _Batch:
    tokens: Tensor
    name: str = "a"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0000001])),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1, 2]), torch.tensor([[1, 2]])),
        (torch.tensor([1]), torch.tensor([1], dtype=torch.int32)),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.01], dtype=torch.bfloat16)),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.zeros(2, 2).t(), torch.tensor([[0.0, 1.0], [0.0, 0.0]]).t()),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}),
        ([torch.zeros(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)]),
        (UserDict(a=torch.zeros(1)), UserDict(a=torch.ones(1))),
        (_Batch(torch.zeros(1)), _Batch(torch.ones(1))),
        (_Batch(torch.zeros(1)), _Batch(torch.zeros(1), name="b")),
        (["text"], ["texts"]),
        ((1, 2.0), (1, 2.5)),
        (torch.zeros(0), torch.zeros(0, 3)),
        (np.zeros(2), np.ones(2)),
        (torch.eye(2).to_sparse(), torch.diag(torch.tensor([1.0, 2.0])).to_sparse()),
        (jagged(2, 3), jagged(3, 2)),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64).mul(1j).conj()),
        (torch.ones(2).to(torch.float8_e8m0fnu), torch.full((2,), 2.0).to(torch.float8_e8m0fnu)),
    ],
)
def test_a_fingerprint_sees_the_difference(a, b):
    fingerprint = loaders._fingerprint
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) == fingerprint(a)


def test_nested_batches_of_the_same_rows_are_the_same_batch():
    assert loaders._fingerprint(jagged(2, 3)) == loaders._fingerprint(jagged(2, 3))


def test_each_batch_is_announced_after_it_was_used():
    announced: list[int] = []
    with repeated(DataLoader(Rows(8), 4)) as own:
        loader = own.combined(on_batch=lambda: announced.append(1))
        seen = [len(announced) for _ in loader]
    assert seen == [0, 1]
    assert len(announced) == 2


class _Collator:
    def __init__(self, generator: Any) -> None:
        self.generator, self.num_calls = generator, 0

    def __call__(self, items: Any) -> Tensor:
        self.num_calls += 1
        return torch.stack([x for x, _ in items]) + self.draw()

    def draw(self) -> float:
        if isinstance(self.generator, torch.Generator):
            return float(torch.rand((), generator=self.generator))
        return float(self.generator.random())


@pytest.mark.parametrize(
    "generator",
    [
        lambda: torch.Generator().manual_seed(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
    ],
)
def test_generators_and_counters_are_put_back_between_passes_and_at_the_end(generator):
    collator = _Collator(generator())
    with repeated(DataLoader(Rows(8), 4, collate_fn=collator)) as own:
        assert same_bits(own.read(), own.read())
        assert collator.num_calls == 0
    other = _Collator(generator())
    assert collator.draw() == other.draw()


def test_generators_are_put_back_where_a_pass_breaks_off():
    collator = _Collator(random.Random(3))
    with pytest.raises(KeyError), repeated(DataLoader(Rows(8), 4, collate_fn=collator)) as own:  # noqa: PT012
        next(iter(own.combined(on_batch=lambda: None)))
        raise KeyError
    assert collator.draw() == random.Random(3).random()


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def collate(self, items: Any) -> Tensor:
        return torch.rand(len(items), generator=self.generator)


def test_a_model_that_collates_has_its_generators_kept():
    module = _Deep()
    with repeated(DataLoader(Rows(8), 4, collate_fn=module.collate)) as own:
        assert same_bits(own.read(), own.read())
    assert same_bits(module.generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_a_list_that_a_sampler_shuffles_in_place_is_put_back():
    class Shuffles(Sampler):
        def __init__(self) -> None:
            self.order = list(range(8))

        def __iter__(self) -> Iterator[int]:
            random.shuffle(self.order)
            return iter(self.order)

        def __len__(self) -> int:
            return 8

    sampler = Shuffles()
    with repeated(DataLoader(Rows(8), 4, sampler=sampler)) as own:
        state = random.getstate()
        first = own.read()
        random.setstate(state)
        assert same_bits(first, own.read())
    assert sampler.order == list(range(8))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_users_persistent_workers_are_neither_used_nor_ended(num_workers):
    loader = DataLoader(AugmentedRows(8), 4, num_workers=num_workers, persistent_workers=True)
    torch.manual_seed(0)
    first = [checksum(batch) for batch in loader]
    workers = loader._iterator
    state = torch.get_rng_state()
    with repeated(loader) as own:
        own.read()
    torch.set_rng_state(state)
    second = [checksum(batch) for batch in loader]
    assert loader._iterator is workers
    assert all(worker.is_alive() for worker in workers._workers)
    del loader, workers
    again = DataLoader(AugmentedRows(8), 4, num_workers=num_workers, persistent_workers=True)
    torch.manual_seed(0)
    assert [[checksum(batch) for batch in again] for _ in range(2)] == [first, second]


class _Iterator:
    def __iter__(self) -> "_Iterator":
        return self

    def __next__(self) -> Tensor:
        raise StopIteration


class _Endless(DataLoader):
    """Keeps one iterator, and its workers with it, through all epochs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.iterator = super().__iter__()


class _Stateful(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (_Iterator, "_Iterator"),
        (lambda: DataLoader(_Stateful()), "_Stateful"),
        (_Stateful, "_Stateful"),
        (lambda: _Endless(Rows(4), 2), "_Endless"),
    ],
)
def test_a_position_of_its_own_is_refused_by_name(loader, named):
    with pytest.raises(EvaluationError, match=rf"validation loader 1: {named} carries a position of its own"):
        repeated(DataLoader(Rows(4)), loader())
    repeated(DataLoader(Rows(4)), loader(), stateful_data="iterate")


def test_a_stream_that_starts_over_is_welcome():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

    with repeated(DataLoader(Stream(), 2)) as own:
        assert same_bits(own.read(), own.read())
