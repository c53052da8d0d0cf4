"""Validation loaders read a second time: the same batches, and nothing of the user's moves."""

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
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, RandomSampler, Subset

from pretrain_merge.errors import EvaluationError
from pretrain_merge.evaluation import loaders
from pretrain_merge.evaluation.loaders import Fingerprints, OwnLoaders


def combined(*given: Any, mode: str = "sequential") -> CombinedLoader:
    return CombinedLoader(list(given), mode)


def read(own: OwnLoaders, *, batches: list[int] | None = None) -> list[Any]:
    """One full pass, with Lightning's own iteration."""
    loader = own.combined(on_batch=lambda: None)
    loader.limits = list(own.max_batches) if batches is None else batches
    found = [batch for batch, _, _ in loader]
    loader.reset()  # as Lightning's loop does when it is torn down
    own.end_pass()
    return found


def own_loaders(*given: Any, **options: Any) -> OwnLoaders:
    return OwnLoaders(combined(*given), [float("inf")] * len(given), **options)


class _Batches:
    """A loader that is no DataLoader."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((2,), float(index)) for index in range(3))


# --- the same batches ---


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
    with own_loaders(loader()) as own:
        torch_state = torch.get_rng_state()
        passes = []
        for _ in range(3):
            torch.set_rng_state(torch_state)  # global generators are the caller's to keep
            passes.append([checksum(batch) for batch in read(own)])
    assert passes[0] == passes[1] == passes[2]
    assert len(passes[0]) >= 3


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size", "max_size_cycle"])
def test_loaders_are_combined_as_the_user_combined_them(mode):
    given = combined(DataLoader(Rows(8), 4), DataLoader(Rows(12, seed=1), 4), mode=mode)
    expected = [batch for batch, _, _ in given]
    with OwnLoaders(given, [3, 3]) as own:
        found = read(own)
    assert len(found) == len(expected)
    assert same_bits(_plain(found), _plain(expected))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_limits_are_those_of_the_trainer():
    with OwnLoaders(combined(DataLoader(Rows(20), 4), DataLoader(Rows(20), 4)), [2, 1]) as own:
        assert [len(read(own)) for _ in range(2)] == [3, 3]
        assert own.num_batches == 3
    assert own_loaders(DataLoader(Rows(4))).num_batches is None


def test_other_batches_are_an_error_that_names_the_loader_and_the_batch():
    class Moves(Rows):
        seen = [0]  # noqa: RUF012 - a counter that no attribute of the instance shows

        def __getitem__(self, index: int) -> Any:
            self.seen[0] += 1
            return super().__getitem__(index)[0] + (self.seen[0] > 12), torch.zeros(1)

    with own_loaders(DataLoader(Rows(8), 4), DataLoader(Moves(8), 4)) as own:
        read(own)
        with pytest.raises(EvaluationError) as error:
            read(own)
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
    ],
)
def test_a_fingerprint_sees_the_difference(a, b):
    fingerprint = loaders._fingerprint
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) == fingerprint(a)


def test_each_batch_is_announced_after_it_was_used():
    announced: list[int] = []
    with own_loaders(DataLoader(Rows(8), 4)) as own:
        loader = own.combined(on_batch=lambda: announced.append(1))
        seen = [len(announced) for _ in loader]
    assert seen == [0, 1]
    assert len(announced) == 2


# --- nothing moves ---


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
    with own_loaders(DataLoader(Rows(8), 4, collate_fn=collator)) as own:
        assert same_bits(read(own), read(own))
        assert collator.num_calls == 2
    assert collator.num_calls == 0
    other = _Collator(generator())
    assert collator.draw() == other.draw()


def test_generators_are_put_back_where_a_pass_breaks_off():
    collator = _Collator(random.Random(3))
    with pytest.raises(KeyError), own_loaders(DataLoader(Rows(8), 4, collate_fn=collator)) as own:  # noqa: PT012
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
    with own_loaders(DataLoader(Rows(8), 4, collate_fn=module.collate)) as own:
        assert same_bits(read(own), read(own))
    assert same_bits(module.generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_large_lists_are_not_searched():
    class Listed(Rows):
        def __init__(self) -> None:
            super().__init__(4)
            self.rows = [object() for _ in range(20_000)]
            self.nested = {"more": [random.Random(1)]}

    parts = list(loaders._stateful_parts(DataLoader(Listed())))
    assert len(parts) < 20
    assert any(isinstance(part, random.Random) for part in parts)


def test_a_data_set_that_refers_to_itself_is_no_trap():
    data = Rows(4)
    data.itself = [data]
    assert data in list(loaders._stateful_parts(DataLoader(data)))


def test_caches_of_a_data_set_stay():
    class Caches(Rows):
        def __init__(self) -> None:
            super().__init__(8)
            self.cache: dict[int, Any] = {}

        def __getitem__(self, index: int) -> Any:
            self.opened = True
            return self.cache.setdefault(index, super().__getitem__(index))

    data = Caches()
    with own_loaders(DataLoader(data, 4)) as own:
        read(own)
    assert len(data.cache) == 8
    assert data.opened


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_users_persistent_workers_are_neither_used_nor_ended(num_workers):
    loader = DataLoader(AugmentedRows(8), 4, num_workers=num_workers, persistent_workers=True)
    torch.manual_seed(0)
    first = [checksum(batch) for batch in loader]
    workers = loader._iterator
    state = torch.get_rng_state()
    with own_loaders(loader) as own:
        read(own)
    torch.set_rng_state(state)
    second = [checksum(batch) for batch in loader]
    assert loader._iterator is workers
    assert all(worker.is_alive() for worker in workers._workers)
    del loader, workers
    again = DataLoader(AugmentedRows(8), 4, num_workers=num_workers, persistent_workers=True)
    torch.manual_seed(0)
    assert [[checksum(batch) for batch in again] for _ in range(2)] == [first, second]


# --- data with a position of their own ---


class _Iterator:
    def __iter__(self) -> "_Iterator":
        return self

    def __next__(self) -> Tensor:
        raise StopIteration


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
    ],
)
def test_a_position_of_its_own_is_refused_by_name(loader, named):
    with pytest.raises(EvaluationError, match=rf"validation loader 1: {named} carries a position of its own"):
        own_loaders(DataLoader(Rows(4)), loader())
    own_loaders(DataLoader(Rows(4)), loader(), stateful_data="iterate")


def test_a_stream_that_starts_over_is_welcome():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

    with own_loaders(DataLoader(Stream(), 2)) as own:
        assert same_bits(read(own), read(own))
