"""Data of every kind: workers, generators, collators, samplers, streams, several loaders."""

import functools
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from harness.models import AugmentedRows, Regression, Rows, rows
from harness.situations.situation import Situation
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler


def two_workers() -> Situation:
    return Situation(
        train=DataLoader(AugmentedRows(), 4, shuffle=True, num_workers=2),
        validation=DataLoader(AugmentedRows(10, seed=1), 4, num_workers=2),
        options={"max_epochs": 1},
    )


def persistent_workers() -> Situation:
    return Situation(
        train=DataLoader(AugmentedRows(), 4, shuffle=True, num_workers=1, persistent_workers=True),
        validation=DataLoader(AugmentedRows(10, seed=1), 4, num_workers=1, persistent_workers=True),
    )


def one_generator_for_train_and_validation() -> Situation:
    generator = torch.Generator().manual_seed(3)
    return Situation(
        train=rows(shuffle=True, generator=generator),
        validation=rows(10, seed=1, shuffle=True, generator=generator),
        generators=(generator,),
        options={"max_epochs": 3},
    )


def shuffled_validation() -> Situation:
    return Situation(validation=rows(10, seed=1, shuffle=True))


def several_validation_loaders() -> Situation:
    return Situation(validation=[rows(10, seed=1, shuffle=True), rows(7, seed=2)])


def a_mapping_of_validation_loaders() -> Situation:
    return Situation(validation={"a": rows(10, seed=1), "b": rows(7, seed=2)})


def a_combined_validation_loader() -> Situation:
    class Module(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for name, part in batch.items():
                if part is not None:
                    self.log(f"val_loss_{name}", self.loss(part), batch_size=len(part[0]))

    loader = CombinedLoader({"a": rows(10, seed=1, shuffle=True), "b": rows(7, seed=2)}, "max_size")
    return Situation(module=Module(), validation=loader)


def random_augmentation() -> Situation:
    return Situation(
        train=DataLoader(AugmentedRows(), 4, shuffle=True), validation=DataLoader(AugmentedRows(10, seed=1), 4)
    )


class _OwnNoise(Rows):
    """Noise from generators that the data set holds, one of which both data sets hold."""

    def __init__(self, num_rows: int, shared: np.random.Generator, own: Any, *, seed: int) -> None:
        super().__init__(num_rows, seed=seed)
        self.shared, self.own = shared, own

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        noise = self.own.gauss(0, 0.1) if isinstance(self.own, random.Random) else self.own.normal(0, 0.1)
        return x + float(self.shared.normal(0, 0.1)) + float(noise), y


def generators_inside_data_sets() -> Situation:
    shared = np.random.default_rng(5)
    return Situation(
        train=DataLoader(_OwnNoise(24, shared, random.Random(1), seed=0), 4, shuffle=True),
        validation=DataLoader(
            ConcatDataset([_OwnNoise(6, shared, np.random.RandomState(2), seed=1), Rows(4, seed=2)]), 4
        ),
    )


class _NoisyCollator:
    """A collator with a generator of its own, as collators that mask tokens have."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        x, y = (torch.stack(part) for part in zip(*items, strict=True))
        return [x + 0.1 * torch.randn(x.shape, generator=self.generator), y]


def one_noisy_collator_for_train_and_validation() -> Situation:
    collator = _NoisyCollator()
    return Situation(
        train=rows(shuffle=True, collate_fn=collator),
        validation=rows(10, seed=1, collate_fn=collator),
        generators=(collator.generator,),
    )


class _LateCollator(_NoisyCollator):
    """Makes its generator at its first batch, and counts."""

    def __init__(self) -> None:
        self.generator, self.num_batches = None, 0

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(11)
        self.num_batches += 1
        x, y = super().__call__(items)
        return [x + self.num_batches / 10, y]


def collators_behind_functions() -> Situation:
    late, closed_over = _LateCollator(), _NoisyCollator()

    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.collator = _NoisyCollator()

        def collate(self, items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            return self.collator(items)

    kinds = [functools.partial(_call, late), lambda items: closed_over(items), Data().collate]
    return Situation(
        train=rows(shuffle=True, collate_fn=kinds[0]),
        validation=[rows(6, seed=seed, collate_fn=kind) for seed, kind in enumerate(kinds)],
        generators=(closed_over.generator, kinds[2].__self__.collator.generator),
    )


def _call(collator: Any, items: Any) -> Any:
    return collator(items)


class _EpochSampler(Sampler[int]):
    """A sampler that counts its passes and shuffles by their number and a generator of its own."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.passes, self.epoch = num_rows, 0, 0
        self.random = random.Random(4)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        order = list(range(self.num_rows))
        random.Random(f"{self.epoch} {self.passes} {self.random.random()}").shuffle(order)
        return iter(order)


def a_sampler_that_counts_passes() -> Situation:
    sampler = _EpochSampler(10)
    return Situation(train=rows(10, sampler=sampler), validation=rows(10, seed=1, sampler=sampler))


class _Stream(IterableDataset):
    """A stream that starts over at each iteration, with global random numbers."""

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.rows = Rows(num_rows, seed=seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self.rows)):
            x, y = self.rows[index]
            yield x + 0.1 * torch.randn(()), y


def streams_that_start_over() -> Situation:
    return Situation(train=DataLoader(_Stream(24, seed=0), 4), validation=DataLoader(_Stream(10, seed=1), 4))


def loaders_that_are_reloaded() -> Situation:
    return Situation(options={"reload_dataloaders_every_n_epochs": 1})


SITUATIONS = [
    two_workers,
    persistent_workers,
    one_generator_for_train_and_validation,
    shuffled_validation,
    several_validation_loaders,
    a_mapping_of_validation_loaders,
    a_combined_validation_loader,
    random_augmentation,
    generators_inside_data_sets,
    one_noisy_collator_for_train_and_validation,
    collators_behind_functions,
    a_sampler_that_counts_passes,
    streams_that_start_over,
    loaders_that_are_reloaded,
]
