"""The Triton kernel without a GPU: the contract in Triton's interpreter, and the instructions that it compiles to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.forks import run_code, run_forked

pytest.importorskip("triton")

WIDE_LOADS = """
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pretrain_merge.kernels import cuda

def machine_code(dtype, alignment):
    constants = dict(
        out_dtype=dtype, in_dtype=dtype, sum_dtype=tl.float32, alignment=alignment, spread=False, block=1024, group=4
    )
    arguments = dict(rows="*i64", items="*i64", coefficients="*fp32", sums="*fp64", num_snapshots="i32")
    kernel = cuda._merge_items
    source = ASTSource(
        kernel,
        {**arguments, **dict.fromkeys(constants, "constexpr")},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(k,): [["tt.divisibility", 16]] for k in range(4)},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))

for dtype, loads_per_snapshot in ((tl.float32, 2), (tl.bfloat16, 1), (tl.float16, 1)):
    code = machine_code(dtype, 16).asm["ptx"]
    wide_loads = len(re.findall(r"ld\\.global\\S*evict_first\\S*\\.v4\\.b32", code))
    wide_stores = len(re.findall(r"st\\.global\\S*\\.v4\\.b32", code))
    print(dtype, wide_loads, wide_stores)
    assert wide_loads == 4 * loads_per_snapshot, code
    assert wide_stores >= loads_per_snapshot, code
    assert not re.search(r"\\.v4\\.b32", machine_code(dtype, 1).asm["ptx"])
"""


@pytest.mark.timeout(600)
def test_the_kernel_keeps_the_contract_in_tritons_interpreter():
    contract = Path(__file__).with_name("test_contract.py")
    options = ["-n", "0", "-k", "cuda", "-q", "-p", "no:cacheprovider"]
    # The interpreter computes with NumPy, which warns where a GPU makes an infinity or a NaN.
    options += ["-W", "ignore::RuntimeWarning"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", str(contract), *options],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stdout
    assert int(re.search(r"(\d+) passed", finished.stdout)[1]) > 100
    assert "skipped" not in finished.stdout


def test_whole_blocks_move_sixteen_bytes_at_a_time_on_an_h100(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code, printed = run_forked(run_code, WIDE_LOADS)
    assert code == 0, printed


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
