"""Coefficients cost no import of arrays, no second computation, and linear time."""

import subprocess
import sys

import pytest

from pretrain_merge.coefficients import compute, replays


def test_coefficients_load_neither_numpy_nor_torch():
    code = "import sys, pretrain_merge.coefficients; print(*sorted({'numpy', 'torch', 'lightning'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_qam_is_computed_once_for_snapshots_that_move_on_evenly():
    replays._chances_of_steps.cache_clear()
    for newest in range(3000, 3050):
        compute("qam", 300, shape="cosine", times=range(10 * (newest - 299), 10 * newest + 1, 10))
    assert replays._chances_of_steps.cache_info().misses == 1
    compute("qam", 300, shape="linear")
    assert replays._chances_of_steps.cache_info().misses == 2


@pytest.mark.parametrize("name", ["ema", "qam"])
def test_coefficients_of_a_long_window_take_linear_time_in_python(name):
    calls = []
    parameters = {"ema": {"alpha": 0.2}, "qam": {"shape": "linear"}}[name]
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    try:
        for n in (200, 400):
            calls.append(n)
            compute(name, n, **parameters)
    finally:
        sys.setprofile(None)
    first, second = calls.index(400) - calls.index(200), len(calls) - calls.index(400)
    assert second < 3 * first
