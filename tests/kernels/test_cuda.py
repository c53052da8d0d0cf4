"""The Triton kernel without a GPU: the contract in Triton's interpreter, and what is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.forks import run_code, run_forked

pytest.importorskip("triton")


@pytest.mark.timeout(600)
def test_the_kernel_keeps_the_contract_in_tritons_interpreter():
    contract = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("contract", "spread")]
    options = ["-n", "0", "-k", "cuda", "-q", "-p", "no:cacheprovider"]
    # The interpreter computes with NumPy, which warns where a GPU makes an infinity or a NaN.
    options += ["-W", "ignore::RuntimeWarning"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *contract, *options],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stdout
    assert int(re.search(r"(\d+) passed", finished.stdout)[1]) > 100
    assert "skipped" not in finished.stdout


def test_without_a_gpu_the_cuda_backend_refuses_cpu_tensors(monkeypatch):
    code = """
import torch
from pretrain_merge.kernels.weighted_sum import weighted_sum_
from pretrain_merge.errors import MergeInputError
try:
    weighted_sum_([torch.zeros(3)], [[torch.ones(3)]], [1.0], backend="cuda")
except MergeInputError as error:
    assert "tensors on cpu" in str(error) and "takes cuda" in str(error), error
else:
    raise SystemExit("not refused")
"""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    status, printed = run_forked(run_code, code)
    assert status == 0, printed
