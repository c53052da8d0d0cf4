"""Faults of the weighted sum."""

from tests.mutations.catalogue.fault import Fault

_CONTRACT = "tests/kernels/test_contract.py"
_SPREAD = "tests/kernels/test_spread.py"
_COMPILED = "tests/kernels/test_compiled.py"

FAULTS = (
    Fault(
        "a spread that float32 lost is believed",
        "kernels/spread.py",
        "if double or self.are_trustworthy(num_snapshots=num_snapshots, num_elements=num_elements):",
        "if True:",
        "tests/kernels/test_spread.py tests/offline/test_without_torch.py",
    ),
    Fault(
        "sums in bfloat16",
        "kernels/reference.py",
        "torch.float64 if double else torch.float32\n    longest",
        "snapshots[0][0].dtype\n    longest",
        _CONTRACT,
    ),
    Fault(
        "the last snapshot is left out",
        "kernels/reference.py",
        "zip(sources[1:], coefficients[1:], strict=True)",
        "zip(sources[1:-1], coefficients[1:-1], strict=True)",
        _CONTRACT,
    ),
    Fault(
        "the spread is from zero",
        "kernels/reference.py",
        "pivot = sources[0].to(torch.float64, copy=True)",
        "pivot = torch.zeros_like(sources[0], dtype=torch.float64)",
        _SPREAD,
    ),
    Fault(
        "bfloat16 is truncated",
        "kernels/cpu_vectors.py",
        "b.lshr(b.add(b.add(bits, v.constant(I32, 0x7FFF)), is_odd), v.constant(I32, 16))",
        "b.lshr(bits, v.constant(I32, 16))",
        _CONTRACT,
    ),
    Fault(
        "tiny deviations underflow",
        "kernels/spread.py",
        "num_snapshots * smallest <= self.squares",
        "0 <= self.squares",
        _SPREAD,
    ),
    Fault(
        "a residue of rounding is a distance",
        "kernels/spread.py",
        "0.0 if distance < 0.0 else distance",
        "distance",
        _SPREAD,
    ),
    Fault(
        "the spread is measured after the merge",
        "kernels/weighted_sum.py",
        "spread and group.replaces",
        "False",
        _SPREAD,
    ),
    Fault(
        "whole blocks are read under a mask",
        "kernels/cuda_kernel.py",
        "(length if masked else block)",
        "(length if masked else block + tl.minimum(num_snapshots, 0))",
        _COMPILED,
    ),
    Fault(
        "values in local memory",
        "kernels/cuda_kernel.py",
        "else (128 if spread else 64)",
        "else (80 if spread else 40)",
        _COMPILED,
    ),
    Fault(
        "a kernel for each N",
        "kernels/cuda_kernel.py",
        '(do_not_specialize=["num_snapshots"])',
        "",
        _COMPILED,
    ),
)
