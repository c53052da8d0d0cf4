"""A spike is seen where it began; by the same numbers whenever they are read, in one piece or resumed."""

import json
import math
from dataclasses import replace

import numpy as np
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_loss_is_kept_although_the_next_step_writes_into_its_memory(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    detector, same = SpikeDetector(), torch.zeros(shape, dtype=dtype, requires_grad=True)
    for step in range(1, 4):
        same.data.fill_(step)
        detector.observe(step, same)
    detector.observe(4, 4.0)
    assert [loss for loss, _ in detector.state_dict()["ahead"]] == [1.0, 2.0, 3.0, 4.0]


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


@pytest.mark.parametrize("levels", [(2.0, 0.5), (3.0, 1.0, 1.1)])
def test_a_loss_that_goes_between_levels_by_turns_is_not_a_spike(levels: tuple[float, ...]) -> None:
    """Two networks that train by turns, or batches of one source each."""
    assert find_onsets([levels[step % len(levels)] + 1e-3 * (step * 7 % 11) for step in range(600)]) == []


def test_a_loss_without_noise_is_not_a_spike() -> None:
    assert find_onsets([2.0 + 1e-6 * (step % 7) for step in range(400)]) == []


@pytest.mark.parametrize("level", [0.0, 2.0, math.log(2.0)])
@pytest.mark.parametrize("jitter", [0.0, 1e-7])
@pytest.mark.parametrize("then", ["noisy", "jumps", "jumps by turns"])
def test_a_loss_that_stood_still_is_not_judged_until_its_noise_is_known(level: float, jitter: float, then: str) -> None:
    """Batches without a target, a rate of 0, a saturated network: every change is infinitely far from it."""
    draws = np.random.default_rng(0)
    change = {
        "noisy": level + 0.2 * np.abs(draws.normal(1.0, 1.0, 700)),
        "jumps": level + 1.0 + 0.1 * draws.normal(0.0, 1.0, 700),
        "jumps by turns": level + 1.0 * (np.arange(700) % 3 == 0),
    }[then]
    still = level * (1.0 + jitter * draws.integers(-1, 2, 300))
    loss = [*still, *change]
    assert find_onsets(loss) == []
    assert find_onsets(loss, [1.0] * 1000) == []


def test_a_collapse_is_seen_where_the_norm_of_the_gradient_stands_still() -> None:
    loss, _ = _collapsing(600, onset=500)
    assert find_onsets(loss[:510], [1.0] * 510)


def test_after_noise_has_begun_a_collapse_is_seen_again() -> None:
    loss, _ = _collapsing(900, onset=700)
    loss[:200] = [2.0] * 200
    (onset,) = find_onsets(loss[:711], first_step=0)
    assert 700 <= onset.step < 711


def test_a_restart_forgets_what_the_loss_was() -> None:
    detector, (loss, _) = SpikeDetector(), _stable(400)
    for step in range(400):
        if step == 300:
            detector.read(step - 1)
            detector.restart()
        detector.observe(step, loss[step] + float(step >= 300))
    assert detector.read(399) is None


def test_a_change_is_forgotten_from_the_next_read_on_also_by_a_run_that_goes_on_before_it() -> None:
    detector, after, (loss, _) = SpikeDetector(), SpikeDetector(), _stable(400)
    for step in range(400):
        if step == 300:
            detector.mark_change()
            after.load_state_dict(json.loads(json.dumps(detector.state_dict(meet=False))))
        for each in (detector, after) if step >= 300 else (detector,):
            each.observe(step, loss[step] + float(step >= 300))
            assert step % 10 != 9 or each.read(step) is None
    assert detector.state_dict()["newest"] == after.state_dict()["newest"] == 399


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


_FEW = {"history": 12, "lag": 3, "fewest": 5, "threshold": 2.0, "sustained": 2, "within": 4, "calm": 6}


def _told_plainly(losses: list[float], norms: list[float]) -> list[Onset]:
    """As the class says it, from the whole run at every step, in NumPy; losses that are not known are NaN."""

    def z(values: np.ndarray, step: int, least: float | None) -> float:
        before = values[max(0, step - 12 - 3) : max(0, step - 3)]
        before = np.sort(before[~np.isnan(before)])
        if np.isfinite(before).sum() < 5:
            return math.nan
        median = before[(len(before) - 1) // 2]
        if not np.isfinite(median):
            return math.nan
        distances = np.sort(np.abs(before - median))
        mad, upper = distances[(len(before) - 1) // 2], distances[3 * (len(before) - 1) // 4]
        unit = abs(median) if least is None else 1.0
        if mad <= 1e-6 * unit:
            return math.nan
        if values[step] <= before[3 * (len(before) - 1) // 4]:
            return 0.0
        return (values[step] - median) / max(1.4826 * mad, upper / 1.1503, 1e-3 * unit)

    loss, norm = np.array(losses), np.log(np.array(norms))
    found: list[Onset] = []
    for step in range(len(loss)):
        newest = [index for index in range(step - 3, step + 1) if index >= 0]
        out = [index for index in newest if z(loss, index, None) > 2.0]
        of_norms = [z(norm, index, 1e-3) for index in newest]
        sees = len(out) >= 2 and out[-1] == step
        sees = sees and (all(map(math.isnan, of_norms)) or any(value > 2.0 for value in of_norms))
        if not (sees or loss[step] == math.inf):
            continue
        if found and step - found[-1].last <= 6:
            found[-1] = replace(found[-1], last=step)
        else:
            found.append(Onset(step if loss[step] == math.inf else out[0], step, ""))
    return found


def _awkward(seed: int) -> tuple[list[float], list[float]]:
    """Ties, steps, gaps, infinities, norms of nothing: on a grid, so that medians are often hit exactly."""
    draws = np.random.default_rng(seed)
    loss = np.round(draws.normal(2.0, 1.0, 200) * draws.choice([1, 4, 40]), 0) * 0.5
    loss += 3.0 * (np.arange(200) > draws.integers(200)) * draws.integers(0, 2)
    norm = np.exp(np.round(draws.normal(0, 1, 200), 1))
    for share, values, value in ((0.1, loss, math.nan), (0.1, norm, math.nan), (0.02, loss, math.inf)):
        values[draws.random(200) < share * draws.integers(0, 3)] = value
    norm[draws.random(200) < 0.1 * draws.integers(0, 2)] = 0.0
    norm = norm.astype(np.float32).astype(np.float64)  # as they are read
    return loss.tolist(), norm.tolist() if draws.integers(2) else [math.nan] * 200


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("seed", range(40))
def test_what_is_seen_is_what_sorting_everything_anew_at_every_step_sees(seed: int) -> None:
    loss, norm = _awkward(seed)
    detector, found = SpikeDetector(**_FEW), {}
    for step, (value, size) in enumerate(zip(loss, norm, strict=True)):
        detector.observe(step, *(None if math.isnan(item) else item for item in (value, size)))
        if step % 4 == 3 and (onset := detector.read(step)) is not None:
            found[onset.step] = replace(onset, reason="", is_new=True)
        if step % 37 == 36:
            state = json.loads(json.dumps(detector.state_dict()))
            detector = SpikeDetector(**_FEW)
            detector.load_state_dict(state)
    assert list(found.values()) == _told_plainly(loss, norm)
