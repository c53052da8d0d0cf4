"""The Triton kernel compiled for GPUs that are not here. Triton's compiler and the ptxas of its wheel need none."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

# The same value, by a way that no compiler sees through: a whole block then has a mask of unknown length.
MASKED_BLOCKS = ("(length if masked else block)", "(length if masked else block + tl.minimum(num_snapshots, 0))")


class Case(NamedTuple):
    """One compiled kernel.

    Attributes:
        target: Compute capability: 80 (A100), 90 (H100), 100 (B200).
        output: Dtype of what is written.
        inputs: Dtype of the snapshots; None: several.
        spread: Measure it.
        aligned: All tensors begin at multiples of 16 bytes.
        whole_blocks_are_masked: A fault that the tests are for: a mask of unknown length on every access.
    """

    target: int
    output: str
    inputs: str | None
    spread: bool = False
    aligned: bool = True
    whole_blocks_are_masked: bool = False


def compile_all(cases: str, result: str) -> None:
    """Compile JSON's list of cases; writes a list of PTX and what ptxas says of registers into the file `result`.

    For a process of its own: Triton decides at its import whether it interprets kernels, and a kernel whose text was
    changed stays so.
    """
    import triton

    from pretrain_merge.kernels import cuda_kernel

    triton.knobs.nvidia.dump_ptxas_log = True
    compiled = []
    for case in (Case(*fields) for fields in json.loads(cases)):
        if case.whole_blocks_are_masked:
            _replace(cuda_kernel._merge_block, *MASKED_BLOCKS, caller=cuda_kernel.merge_items)
        with contextlib.redirect_stdout(io.StringIO()) as log:
            ptx = _compile(case)
        compiled.append((ptx, log.getvalue()))
    Path(result).write_text(json.dumps(compiled))


def specializations(numbers: str, result: str) -> None:
    """What Triton compiles by, for calls with each of these numbers of snapshots; a text for each."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from pretrain_merge.kernels import cuda_kernel

    kernel = cuda_kernel.merge_items
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    table, coefficients, sums = torch.empty(64, dtype=torch.int64), torch.empty(64), torch.empty(0, 3)
    found = []
    for number in json.loads(numbers):
        constants = cuda_kernel.constants(None, torch.float32, double=False, aligned=True, spread=False)
        options = cuda_kernel.launch_options(double=False, spread=False)
        _, key, *_ = bind(table, table, coefficients, sums, number, **constants, **options, debug=False)
        found.append(str(key))
    Path(result).write_text(json.dumps(found))


def _compile(case: Case) -> str:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pretrain_merge.kernels import cuda_kernel

    kernel, double = cuda_kernel.merge_items, "float64" in (case.output, case.inputs)
    inputs = getattr(torch, case.inputs) if case.inputs else None
    output = getattr(torch, case.output)
    constants = cuda_kernel.constants(inputs, output, double=double, aligned=case.aligned, spread=case.spread)
    pointers = {"rows": "*i64", "items": "*i64", "coefficients": "*fp64" if double else "*fp32", "sums": "*fp64"}
    source = ASTSource(
        kernel,
        {**pointers, "num_snapshots": "i32", **dict.fromkeys(constants, "constexpr")},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(number,): [["tt.divisibility", 16]] for number in range(len(pointers))},
    )
    options = cuda_kernel.launch_options(double=double, spread=case.spread)
    return str(triton.compile(source, target=GPUTarget("cuda", case.target, 32), options=options).asm["ptx"])


def _replace(kernel: Any, before: str, after: str, *, caller: Any) -> None:
    assert kernel.src.count(before) == 1
    kernel._unsafe_update_src(kernel.src.replace(before, after))
    caller.hash = None  # else the kernel as it was comes out of Triton's cache
