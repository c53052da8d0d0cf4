"""A spike is seen where it began; by the same numbers whenever they are read, in one piece or resumed."""

import json
import math

import pytest
import torch

from pretrain_merge.spikes import Onset, SpikeDetector, find_onsets


def _stable(num_steps: int, seed: int = 0) -> tuple[list[float], list[float]]:
    draws = torch.Generator().manual_seed(seed)
    falls = 2.0 + torch.exp(-torch.arange(num_steps) / 200)
    loss = falls + 0.05 * torch.randn(num_steps, generator=draws)
    return loss.tolist(), (0.2 * torch.randn(num_steps, generator=draws)).exp().tolist()


def _collapsing(num_steps: int, onset: int) -> tuple[list[float], list[float]]:
    loss, norm = _stable(num_steps)
    for step in range(onset, num_steps):
        loss[step] += 0.1 * (1 + step - onset)
        norm[step] *= 3.0
    return loss, norm


def test_a_stable_run_has_no_spike() -> None:
    assert find_onsets(*_stable(1500)) == []


@pytest.mark.parametrize("with_norm", [True, False])
def test_a_collapse_is_seen_within_ten_steps_of_its_begin(with_norm: bool) -> None:
    loss, norm = _collapsing(600, onset=500)
    (onset,) = find_onsets(loss[:510], norm[:510] if with_norm else None, first_step=0)
    assert 500 <= onset.step < 510
    assert onset.step <= onset.last


def test_one_bad_batch_is_not_a_spike() -> None:
    loss, norm = _stable(600)
    loss[400] += 5.0
    norm[400] *= 20.0
    assert find_onsets(loss, norm) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_at_once(value: float) -> None:
    assert find_onsets([value]) == [Onset(1, 1, "the training loss is NaN or infinite")]


def test_a_high_loss_with_calm_gradients_is_not_a_spike() -> None:
    """Harder data raise the loss and leave the norm where it was."""
    loss, norm = _stable(600)
    harder = [value + (0.5 if step >= 400 else 0.0) for step, value in enumerate(loss)]
    assert find_onsets(harder)
    assert find_onsets(harder, norm) == []


def test_a_loss_without_noise_is_not_a_spike() -> None:
    assert find_onsets([2.0 + 1e-6 * (step % 7) for step in range(400)]) == []


def test_a_restart_forgets_what_the_loss_was() -> None:
    detector = SpikeDetector()
    for step in range(400):
        if step == 300:
            detector.read(step - 1)
            detector.restart()
        detector.observe(step, torch.tensor(2.0 if step < 300 else 3.0))
    assert detector.read(399) is None


@pytest.mark.parametrize("every", [1, 7, 20])
def test_what_is_seen_does_not_depend_on_when_it_is_read_or_resumed(every: int) -> None:
    loss, norm = _collapsing(600, onset=500)
    detector, seen = SpikeDetector(), {}
    for step, (value, size) in enumerate(zip(loss, norm, strict=True), start=1):
        detector.observe(step, torch.tensor(value), torch.tensor(size))
        if step % every == 0 and (onset := detector.read(step)) is not None:
            seen[onset.step] = onset
        if step % 31 == 0:
            state = json.loads(json.dumps(detector.state_dict()))
            detector = SpikeDetector()
            detector.load_state_dict(state)
    assert [onset.step for onset in find_onsets(loss, norm)] == list(seen)


def test_a_step_without_a_loss_is_not_judged() -> None:
    detector = SpikeDetector()
    for step in range(300):
        detector.observe(step, None if step % 3 else torch.tensor(2.0))
    assert detector.read(299) is None
