"""The Triton kernel without a GPU: the contract in Triton's interpreter, and what is refused."""

import re
from pathlib import Path

import pytest
from harness.forks import run_code, run_forked

pytest.importorskip("triton")


def run_contract():
    """The tests of the contract in this process, which has not imported Triton yet."""
    contract = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("contract", "spread")]
    options = ["-n", "0", "-k", "cuda", "-q", "-p", "no:cacheprovider"]
    # The interpreter computes with NumPy, which warns where a GPU makes an infinity or a NaN.
    options += ["-W", "ignore::RuntimeWarning", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([*contract, *options])


@pytest.mark.timeout(600)
def test_the_kernel_keeps_the_contract_in_tritons_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read at Triton's import
    status, printed = run_forked(run_contract, timeout=500)
    assert status == 0, printed
    assert int(re.search(r"(\d+) passed", printed)[1]) > 100
    assert "skipped" not in printed


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
