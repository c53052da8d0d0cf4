"""The running sum behind `average: block`, against means computed in float64."""

import numpy as np
import pytest
import torch
from harness import oracles

from pretrain_merge.window.block_mean import BlockMean

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def models(count, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (3, 5), "bias": (7,)}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def as_array(tensor):
    return tensor.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_of_the_samples_is_exact_to_float32_accumulation(dtype):
    block, sampled = BlockMean(1), models(20, dtype=dtype)
    for step, model in enumerate(sampled, start=1):
        block.sample(step, lambda model=model: model)
    for index, mean in enumerate(block.mean()):
        arrays = [as_array(list(model.values())[index]) for model in sampled]
        accumulator = str(mean.dtype).removeprefix("torch.")
        assert accumulator == ("float64" if dtype == torch.float64 else "float32")
        tolerance = oracles.merge_tolerance(arrays, [1 / 20] * 20, accumulator)
        assert np.all(np.abs(as_array(mean) - np.mean(arrays, axis=0)) <= tolerance)


def test_a_sum_kept_in_bfloat16_would_be_seen():
    sampled = models(20, dtype=torch.bfloat16)
    arrays = [as_array(model["weight"]) for model in sampled]
    total = torch.zeros_like(sampled[0]["weight"])
    for model in sampled:
        total += model["weight"]
    error = np.abs(as_array(total / 20) - np.mean(arrays, axis=0))
    assert np.any(error > oracles.merge_tolerance(arrays, [1 / 20] * 20, "bfloat16"))


def test_only_steps_that_are_multiples_of_sample_every_are_read():
    block, read = BlockMean(3), []

    def live_at(step):
        read.append(step)
        return {"weight": torch.full((2,), float(step))}

    for step in range(11, 21):
        block.sample(step, lambda step=step: live_at(step))
    assert read == [12, 15, 18]
    assert block.mean()[0].tolist() == [15.0, 15.0]


def test_one_accumulator_is_allocated_once_and_used_for_every_interval():
    block, addresses = BlockMean(1), []
    for interval in range(3):
        for step, model in enumerate(models(4, seed=interval), start=1):
            block.sample(step, lambda model=model: model)
        addresses.append([total.data_ptr() for total in block.mean()])
        block.restart()
    assert addresses[0] == addresses[1] == addresses[2]


def test_the_live_model_is_read_and_never_written():
    block, sampled = BlockMean(1), models(3)
    copies = [{name: tensor.clone() for name, tensor in model.items()} for model in sampled]
    for step, model in enumerate(sampled, start=1):
        block.sample(step, lambda model=model: model)
    block.mean()
    for model, copy in zip(sampled, copies, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in copy)


def test_an_interval_without_samples_is_not_whole():
    block = BlockMean(10)
    block.sample(7, dict)
    assert not block.is_complete
    assert not block.is_invalid


def test_a_break_spoils_the_interval_that_is_open():
    block, (model,) = BlockMean(1), models(1)
    block.sample(1, lambda: model)
    assert block.is_complete
    block.invalidate()
    assert not block.is_complete
    assert block.is_invalid
    block.sample(2, lambda: pytest.fail("nothing more is read of a spoilt interval"))
    block.restart()
    block.sample(3, lambda: model)
    assert block.is_complete


def test_a_break_before_the_first_step_of_an_interval_spoils_nothing():
    block, (model,) = BlockMean(1), models(1)
    block.invalidate()
    block.sample(1, lambda: model)
    assert block.is_complete


def test_a_break_spoils_an_interval_of_which_steps_were_seen_but_not_sampled():
    block = BlockMean(5)
    block.sample(1, dict)
    block.invalidate()
    assert block.is_invalid


def test_steps_that_nobody_saw_spoil_the_interval_even_at_its_start():
    block, (model,) = BlockMean(1), models(1)
    block.miss()
    block.sample(1, lambda: model)
    assert not block.is_complete


def test_a_model_that_changes_shape_within_an_interval_spoils_it():
    block = BlockMean(1)
    block.sample(1, lambda: {"weight": torch.ones(3)})
    block.sample(2, lambda: {"weight": torch.ones(4)})
    assert not block.is_complete
    block.restart()
    block.sample(3, lambda: {"weight": torch.ones(4)})
    assert block.mean()[0].tolist() == [1.0] * 4
