"""How far snapshots lie from their mean, as every backend measures it: at any magnitude, never below zero."""

import math

import pytest
import torch
from kernels import oracle
from kernels.oracle import random_coefficients

from pretrain_merge.kernels.spread import Spread, Sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def assert_is_spread(measured, snapshots, rel=1e-4):
    expected = oracle.spread(snapshots)
    assert measured.squared_distance == pytest.approx(expected[0], rel=rel, abs=0.0)
    assert measured.squared_norm == pytest.approx(expected[1], rel=rel, abs=0.0)
    assert measured.relative_rms == pytest.approx(math.sqrt(expected[0] / expected[1]), rel=rel, abs=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_snapshots", [2, 10, 30])
def test_the_spread_is_the_distance_from_the_mean(backend, make, dtype, num_snapshots):
    centre = [make(500), make(33)] if backend.longest > 5000 or num_snapshots < 30 else [make(33)]
    snapshots = [[(tensor + 0.01 * make(*tensor.shape)).to(dtype) for tensor in centre] for _ in range(num_snapshots)]
    expected = oracle.spread(snapshots)
    out = [torch.empty_like(tensor) for tensor in snapshots[0]]
    measured = backend.merge(out, snapshots, random_coefficients(num_snapshots), spread=True)
    # Deviations and their squares are summed in float32: N + 2 roundings, and a difference that may cancel a factor N.
    relative = 2 * num_snapshots * (num_snapshots + 2) * 2.0**-24
    assert measured.squared_distance == pytest.approx(expected[0], rel=relative)
    assert measured.squared_norm == pytest.approx(expected[1], rel=relative)
    assert measured.relative_rms == pytest.approx(math.sqrt(expected[0] / expected[1]), rel=relative)


def test_the_merge_is_the_same_with_and_without_the_spread(backend, make):
    snapshots = [[make(1100)] for _ in range(15)]
    plain, measured = make(1100), make(1100)
    coefficients = random_coefficients(15)
    backend.merge([plain], snapshots, coefficients)
    backend.merge([measured], snapshots, coefficients, spread=True)
    assert torch.equal(plain, measured)


def test_the_spread_of_far_away_snapshots_does_not_cancel(backend, make):
    offset = 4096.0
    steps = [torch.full((600,), offset, device=backend.device) + make(600).sign() * 2.0**-11 for _ in range(8)]
    expected = oracle.spread([[step] for step in steps])
    measured = backend.merge([make(600)], [[step] for step in steps], [0.125] * 8, spread=True)
    assert measured.squared_distance == pytest.approx(expected[0], rel=1e-5)
    naive = sum(float((step**2).sum()) for step in steps) / 8 - float((sum(steps) / 8).square().sum())
    assert naive != pytest.approx(expected[0], rel=0.1)  # this is what the pivot is for


def test_the_spread_of_a_snapshot_from_itself_is_zero(backend, make):
    snapshot = make(100)
    assert backend.merge([make(100)], [[snapshot]], [1.0], spread=True).squared_distance == 0.0
    measured = backend.merge([make(100)], [[snapshot]] * 3, [0.2, 0.3, 0.5], spread=True)
    assert measured.squared_distance == 0.0
    assert measured.relative_rms == 0.0
    assert measured.squared_norm == pytest.approx(oracle.spread([[snapshot]])[1], rel=1e-6)


def test_the_spread_of_a_nan_is_nan(backend, make):
    snapshots = [make(50), make(50)]
    snapshots[1][7] = math.nan
    measured = backend.merge([make(50)], [[snapshot] for snapshot in snapshots], [0.5, 0.5], spread=True)
    assert math.isnan(measured.squared_distance)
    assert math.isnan(measured.relative_rms)


def test_the_spread_covers_every_tensor_of_a_mixed_list(backend, make):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    snapshots = [[make(60, dtype=dtype) for dtype in dtypes] + [make(6, 5).t()] for _ in range(3)]
    out = [torch.empty_like(tensor) for tensor in snapshots[0][:4]] + [make(5, 6)]
    measured = backend.merge(out, snapshots, [0.2, 0.3, 0.5], spread=True)
    assert measured == pytest.approx(oracle.spread(snapshots), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-23, 1e-30, 1e-39, 1e22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_magnitude_of_the_weights_is_too_small_or_too_large(backend, make, dtype, scale):
    snapshots = [[(make(300).double() * scale).to(dtype)] for _ in range(4)]
    measured = backend.merge([make(300, dtype=dtype)], snapshots, [0.25] * 4, spread=True)
    assert measured.squared_distance > 0.0
    assert_is_spread(measured, snapshots)


@pytest.mark.parametrize("deviation", [1e-19, 1e-24, 1e-30])
def test_a_tiny_step_beside_zero_is_a_step(backend, make, deviation):
    snapshots = [[torch.zeros(200, device=backend.device)], [make(200) * deviation]]
    assert_is_spread(backend.merge([make(200)], snapshots, [0.5, 0.5], spread=True), snapshots)


@pytest.mark.parametrize("deviation", [1e-19, 1e-24, 1e-30])
def test_a_tiny_step_beside_weights_that_do_not_move_is_a_step(backend, make, deviation):
    fixed = make(100)
    snapshots = [[fixed.clone(), make(50) * deviation] for _ in range(3)]
    out = [torch.empty_like(tensor) for tensor in snapshots[0]]
    assert_is_spread(backend.merge(out, snapshots, [0.2, 0.3, 0.5], spread=True), snapshots)


def test_tensors_of_very_different_magnitude_add_up(backend, make):
    scales = [1e-30, 1.0, 1e-3]
    snapshots = [[make(100) * scale for scale in scales] for _ in range(3)]
    out = [torch.empty_like(tensor) for tensor in snapshots[0]]
    assert_is_spread(backend.merge(out, snapshots, [0.2, 0.3, 0.5], spread=True), snapshots)


@pytest.mark.parametrize("scale", [1.0, 1e-26])
def test_an_output_that_replaces_a_snapshot_is_measured_before(backend, make, scale):
    snapshots = [[make(100) * scale] for _ in range(3)]
    originals = [[tensor.clone() for tensor in snapshot] for snapshot in snapshots]
    measured = backend.merge(snapshots[-1], snapshots, [0.2, 0.3, 0.5], spread=True)
    assert_is_spread(measured, originals)


def test_an_oldest_snapshot_far_from_all_others_leaves_no_residue_of_rounding(backend, make):
    # The mean of squares and the square of the mean agree to one part in N here, where float32 sums are off by as much.
    num_others = 100 if backend.longest < 5000 else 1000  # Triton's interpreter takes 20 ms for each
    others = make(5)
    snapshots = [[make(5) + 3.0], *([others + 1e-6 * make(5)] for _ in range(num_others))]
    coefficients = [1 / len(snapshots)] * len(snapshots)
    assert_is_spread(backend.merge([make(5)], snapshots, coefficients, spread=True), snapshots, rel=1e-3)


def test_a_residue_of_rounding_below_zero_is_nothing():
    assert Spread(-1e-50, 0.0).relative_rms == 0.0
    assert Spread(-1e-50, 1.0).relative_rms == 0.0
    assert Sums(squares=1.0, squared_deviation=4.1, squared_norm=1.0).spread(2) == Spread(0.0, 1.0)


def test_a_nan_is_not_taken_for_a_residue():
    assert math.isnan(Sums(math.nan, math.nan, 1.0).spread(2).squared_distance)
    assert math.isnan(Spread(math.nan, 1.0).relative_rms)
    assert not Sums(math.nan, 1.0, 1.0).are_trustworthy(num_snapshots=2, num_elements=1)


def test_weights_of_usual_size_are_read_once(monkeypatch, backend, make):
    """Measuring once more in float64 is for the rare cases: it would be slower than the merge."""

    def measure(snapshots):
        raise AssertionError("measured once more")

    snapshots = [[make(500), 1e-8 * make(40)] for _ in range(12)]
    out = [torch.empty_like(tensor) for tensor in snapshots[0]]
    monkeypatch.setattr("pretrain_merge.kernels.reference.measure", measure)
    assert_is_spread(backend.merge(out, snapshots, [1 / 12] * 12, spread=True), snapshots)
