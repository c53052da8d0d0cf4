"""Around the kernels: choice, compilation, threads, memory and processes."""

import ctypes
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from harness.forks import run_code, run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import oracle

from pretrain_merge.kernels import reference
from pretrain_merge.kernels.weighted_sum import weighted_sum_

pytest.importorskip("llvmlite")

from pretrain_merge.kernels import flat
from pretrain_merge.kernels.cpu_kernel import compile_kernel
from pretrain_merge.kernels.llvm import converts_float16

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def merges(draw):
    """Lists of tensors with any dtypes and shapes, and any coefficients."""
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=4))
    num_snapshots = draw(st.integers(1, 15))
    seeds = iter(range(1000))

    def tensors():
        return [normal(*shape, seed=next(seeds)).to(draw(st.sampled_from(DTYPES))) for shape in shapes]

    coefficients = draw(st.lists(st.floats(-4, 4), min_size=num_snapshots, max_size=num_snapshots))
    return tensors(), [tensors() for _ in range(num_snapshots)], coefficients


@given(merges())
@settings(max_examples=150, deadline=None)
def test_both_cpu_backends_are_right_on_whatever_users_have(merge):
    out, snapshots, coefficients = merge
    for backend in ("cpu", "reference"):
        result = [tensor.clone() for tensor in out]
        weighted_sum_(result, snapshots, coefficients, backend=backend)
        for i, tensor in enumerate(result):
            oracle.assert_is_weighted_sum(tensor, [snapshot[i] for snapshot in snapshots], coefficients)


def test_a_whole_list_is_one_kernel_call_per_accumulator_dtype(monkeypatch):
    calls = []
    monkeypatch.setattr(flat, "_run", lambda kernel, arguments, num_threads: calls.append(arguments))
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 20 + [torch.float64] * 5
    tensors = [torch.ones(3 + i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    weighted_sum_(tensors, [tensors, tensors], [0.5, 0.5], backend="cpu")
    assert len(calls) == 2


def test_results_do_not_depend_on_the_number_of_threads():
    sizes = [3, (1 << 20) + 77, 5, (1 << 19) - 1]
    snapshots = [[normal(size, seed=i).bfloat16() for size in sizes] for i in range(3)]
    coefficients = [0.2, 0.3, 0.5]
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            out = [torch.zeros(size) for size in sizes]
            results.append((out, weighted_sum_(out, snapshots, coefficients, spread=True, backend="cpu")))
        finally:
            torch.set_num_threads(1)
    for out, spread in results[1:]:
        assert spread == results[0][1]
        assert all(torch.equal(*pair) for pair in zip(out, results[0][0], strict=True))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_as_many_threads_work_as_torch_uses(monkeypatch, num_threads):
    used, before = set(), threading.active_count()
    compiled = flat._kernel(False, False, False)

    def kernel(*arguments):
        used.add(threading.get_ident())
        started.wait(20)
        compiled(*arguments)

    started = threading.Barrier(num_threads)
    monkeypatch.setattr(flat, "_kernel", lambda double, spread, paired: kernel)
    torch.set_num_threads(num_threads)
    try:
        out, source = torch.zeros(1 << 22), normal(1 << 22)
        weighted_sum_([out], [[source], [source]], [0.5, 0.25], backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert len(used) == num_threads
    assert torch.equal(out, 0.75 * source)
    assert threading.active_count() == before  # none is left behind


def test_small_merges_start_no_threads(monkeypatch):
    counts = []
    monkeypatch.setattr(flat, "_run", lambda kernel, arguments, num_threads: counts.append(num_threads))
    torch.set_num_threads(4)
    try:
        weighted_sum_([torch.zeros(1000)], [[torch.ones(1000)]] * 10, [0.1] * 10, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert counts == [1]


def test_merges_in_several_python_threads_do_not_disturb_each_other():
    sources = [[normal(1 << 18, seed=3 * k + j) for j in range(3)] for k in range(4)]
    results = [torch.zeros(1 << 18) for _ in sources]

    def work(k):
        for _ in range(20):
            weighted_sum_([results[k]], [[source] for source in sources[k]], [0.2, 0.3, 0.5], backend="cpu")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for k, result in enumerate(results):
        oracle.assert_is_weighted_sum(result, sources[k], [0.2, 0.3, 0.5])


def test_a_forked_process_can_merge_after_its_parent_did():
    code = """
import os, torch, warnings
from pretrain_merge.kernels.weighted_sum import weighted_sum_
warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads, torch's own included
torch.set_num_threads(2)
source, out = torch.ones(1 << 21), torch.zeros(1 << 21)
weighted_sum_([out], [[source]] * 3, [1.0] * 3, backend="cpu")
child = os.fork()
if child == 0:  # NumPy looks at the result: torch's own threads do not survive a fork
    weighted_sum_([out], [[source]] * 3, [2.0] * 3, backend="cpu")
    os._exit(0 if (out.numpy() == 6).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (out == 3).all()
"""
    status, printed = run_forked(run_code, code)
    assert status == 0, printed


def peak_growth(action):
    """How many bytes the process's peak resident memory rises above its present one during the action."""

    def resident(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # or the action may take memory that an earlier test freed, and that is resident still
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # forget the peak so far
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the kernel does not report peaks per process")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_model_is_allocated(backend, dtype):
    size = 1 << 25  # 128 MiB in float32
    source, out = torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype)
    weighted_sum_([out[:9]], [[source[:9]]], [1.0], spread=True, backend=backend)  # compiles
    mebibyte = 1 << 20
    assert peak_growth(lambda: out + 0.5) > 0.9 * size * source.element_size()  # such an allocation would be seen

    def merge():
        weighted_sum_([out], [[source], [out]], [0.5, 0.5], spread=True, backend=backend)

    assert peak_growth(merge) < 16 * mebibyte


def test_the_import_brings_no_compiler_and_the_first_merge_only_its_own():
    code = """
import sys
import torch
before = set(sys.modules)
from pretrain_merge.kernels import weighted_sum
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"llvmlite", "numba", "triton", "lightning", "wandb", "matplotlib"}, new
weighted_sum.weighted_sum_([torch.zeros(3)], [[torch.ones(3)]], [1.0])
assert "llvmlite" in sys.modules
assert "numba" not in sys.modules
"""
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0, finished.stderr


def test_without_the_compiler_the_reference_merges_and_says_so_once():
    code = """
import sys, warnings
sys.modules["llvmlite"] = None
import torch
from pretrain_merge.kernels.weighted_sum import weighted_sum_
out = torch.zeros(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for k in range(3):
        weighted_sum_([out, torch.zeros(2)], [[torch.ones(3), torch.ones(2)]], [float(k)])
assert out.tolist() == [2.0] * 3
assert len(caught) == 1, caught
message = str(caught[0].message)
assert "llvmlite" in message and "pretrain-merge[fast]" in message and "plain torch" in message, message
assert caught[0].filename == "<string>", caught[0].filename
"""
    status, printed = run_forked(run_code, code)
    assert status == 0, printed


def test_the_first_merge_of_a_process_is_not_held_up_by_compilation():
    code = """
import time, torch
from pretrain_merge.kernels.weighted_sum import weighted_sum_
start = time.perf_counter()
weighted_sum_([torch.zeros(3)], [[torch.ones(3)]], [1.0], spread=True)
print(time.perf_counter() - start)
"""
    status, printed = run_forked(run_code, code)
    assert status == 0, printed
    assert float(printed) < 10.0  # about 0.5 s on an idle machine


X86_TARGETS = ["haswell", "ivybridge", "skylake-avx512"]


@pytest.mark.skipif(not converts_float16(), reason="this CPU cannot run the kernel at all")
@pytest.mark.parametrize("target", X86_TARGETS)
def test_the_kernel_is_right_on_narrower_cpus(monkeypatch, target):
    features = __import__("llvmlite.binding", fromlist=["binding"]).get_host_cpu_features()
    needed = {"haswell": "avx2", "ivybridge": "f16c", "skylake-avx512": "avx512vl"}[target]
    if not features.get(needed, False):
        pytest.skip(f"this CPU has no {needed}")
    compiled = {}

    def kernel(double, spread, paired):
        key = (double, spread, paired)
        return compiled.setdefault(key, compile_kernel(double=double, spread=spread, paired=paired, cpu=target))

    monkeypatch.setattr(flat, "_kernel", kernel)
    for dtype in DTYPES:
        snapshots = [normal(3003, seed=j).to(dtype) for j in range(14)]
        coefficients = np.linspace(-0.3, 0.9, 14).tolist()
        out = torch.zeros(3003, dtype=dtype)
        spread = weighted_sum_([out], [[s] for s in snapshots], coefficients, spread=True, backend="cpu")
        oracle.assert_is_weighted_sum(out, snapshots, coefficients)
        assert spread == pytest.approx(oracle.spread([[s] for s in snapshots]), rel=1e-5)
    assert compiled


def test_a_memory_mapped_file_is_a_snapshot_like_any_other(tmp_path):
    np.arange(5000, dtype=np.float32).tofile(tmp_path / "weights")
    mapped = torch.from_numpy(np.memmap(tmp_path / "weights", dtype=np.float32, mode="r+"))
    out = torch.zeros(5000)
    weighted_sum_([out], [[mapped], [mapped]], [0.5, 0.25], backend="cpu")
    assert torch.equal(out, 0.75 * mapped)


def test_an_output_at_an_odd_address_is_written_one_element_at_a_time():
    buffer = bytearray(4 * 103 + 2)
    out = torch.frombuffer(buffer, dtype=torch.float32, offset=2, count=103)
    assert out.data_ptr() % 4 == 2
    snapshots = [normal(103, seed=j) for j in range(3)]
    weighted_sum_([out], [[snapshot] for snapshot in snapshots], [0.2, 0.3, 0.5], backend="cpu")
    oracle.assert_is_weighted_sum(out.clone(), snapshots, [0.2, 0.3, 0.5])
    assert bytes(buffer[:2]) == b"\0\0"


def test_the_reference_reads_every_chunk_of_a_tensor_once(monkeypatch):
    monkeypatch.setattr(reference, "_LONGEST_CHUNK", 7)
    snapshots = [normal(13, 11, 3, seed=j).transpose(0, 2) for j in range(4)]
    out = torch.full((3, 11, 13), torch.nan)
    spread = weighted_sum_([out], [[s] for s in snapshots], [0.1, 0.2, 0.3, 0.4], spread=True, backend="reference")
    oracle.assert_is_weighted_sum(out, snapshots, [0.1, 0.2, 0.3, 0.4])
    assert spread == pytest.approx(oracle.spread([[s] for s in snapshots]), rel=1e-12)
