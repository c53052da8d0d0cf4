"""What the Triton kernel compiles to for GPUs that are not here: wide accesses, registers, one kernel for every N."""

import json
import re
from types import SimpleNamespace

import pytest
from harness.forks import run_forked
from kernels.compiling import Case, compile_all, specializations

pytest.importorskip("triton")

TARGETS = (80, 90, 100)
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
THREADS, BLOCK, GROUP = 128, 1024, 4
REGISTERS_OF_AN_SM = 65_536

PAIRS = [Case(90, output, inputs) for output in SIZES for inputs in SIZES]
# one text and one branch for each dtype: what a mix of them adds is seen in these
USUAL = [case for case in PAIRS if case.output == case.inputs or {case.output, case.inputs} == {"float32", "bfloat16"}]
ALIGNED = [
    *USUAL,
    *(Case(target, dtype, dtype) for target in (80, 100) for dtype in ("float32", "bfloat16")),
    *(Case(target, "bfloat16", "bfloat16", spread=True) for target in TARGETS),
    Case(90, "float64", "float64", spread=True),
    Case(100, "float32", None),
]
OTHERS = [case for case in PAIRS if case not in USUAL]
UNALIGNED = Case(90, "float32", "float32", aligned=False)
MASKED = Case(90, "bfloat16", "bfloat16", whole_blocks_are_masked=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a function of `compiling` in a process in which Triton compiles."""

    def run_it(function, given):
        folder = tmp_path_factory.mktemp("compiled")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
            code, printed = run_forked(function, json.dumps(given), str(folder / "result"))
        assert code == 0, printed
        return json.loads((folder / "result").read_text())

    return run_it


@pytest.fixture(scope="module")
def kernels(run):
    """All of them, compiled once for all tests: a fault in the text comes last."""
    return compiled(run, [*ALIGNED, UNALIGNED, MASKED])


def compiled(run, cases):
    pairs = zip(cases, run(compile_all, cases), strict=True)
    return {case: SimpleNamespace(ptx=ptx, log=log) for case, (ptx, log) in pairs}


def wide_bytes(ptx, instruction):
    """Bytes that a thread moves by accesses of at least 16 bytes."""
    found = re.findall(rf"{instruction}\S*\.v(\d)\.b(\d+)", ptx)
    sizes = [int(count) * int(bits) // 8 for count, bits in found]
    return sum(size for size in sizes if size >= 16)


def moves_wide(case, ptx):
    """Whether all that a thread reads and writes of a whole block moves in accesses of at least 16 bytes."""
    elements = BLOCK // THREADS
    # snapshots of several dtypes have a branch for each
    per_snapshot = elements * (SIZES[case.inputs] if case.inputs else sum(SIZES.values()))
    num_read = GROUP + case.spread  # the oldest once more, from which deviations are taken
    is_read = wide_bytes(ptx, r"ld\.global\S*evict_first") == num_read * per_snapshot
    # Without the spread, the masked store of the last block may be wide as well where the compiler splits it by length.
    return is_read and wide_bytes(ptx, r"st\.global") >= elements * SIZES[case.output]


@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_whole_blocks_move_at_least_sixteen_bytes_at_a_time(kernels, case):
    assert moves_wide(case, kernels[case].ptx)


@pytest.mark.parametrize("case", [UNALIGNED, MASKED], ids=["odd addresses", "a mask in the main path"])
def test_a_narrowed_access_would_be_seen(kernels, case):
    assert not moves_wide(case, kernels[case].ptx)
    assert wide_bytes(kernels[case].ptx, r"ld\.global\S*evict_first") == 0


@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_every_value_is_in_registers_and_enough_programs_fit(kernels, case):
    assert_is_in_registers(case, kernels[case])


@pytest.mark.long
def test_whole_blocks_move_wide_and_in_registers_for_every_mix_of_dtypes(run):
    for case, kernel in compiled(run, OTHERS).items():
        assert moves_wide(case, kernel.ptx), case
        assert_is_in_registers(case, kernel)


def assert_is_in_registers(case, kernel):
    log = kernel.log
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log) == [
        ("0",) * 3
    ]
    assert ".local" not in kernel.ptx
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    programs = REGISTERS_OF_AN_SM // (THREADS * 8 * -(-registers // 8))  # registers are given out by 8
    double = "float64" in (case.output, case.inputs)
    assert programs >= {(False, False): 8, (False, True): 4, (True, False): 5, (True, True): 3}[double, case.spread]


def test_one_kernel_serves_every_number_of_snapshots(run):
    keys = run(specializations, [1, 2, 3, 10, 16, 32, 100, 4096])
    assert len(set(keys)) == 1, keys
    assert "('i32', None)" in keys[0]  # what Triton compiles by: 1 would be a constant, multiples of 16 apart
