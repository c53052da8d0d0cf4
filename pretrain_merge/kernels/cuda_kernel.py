"""The CUDA kernel: a weighted sum of many streams in one pass, in Triton.

Knows addresses, dtypes and registers; knows no tensors and no launches. Written for the bandwidth of an H100 (3.35
TB/s, about 0.6 us to memory, so some 2 MB, or 15 KB per SM, must be under way at all times) and not tied to it:

- A program owns one **item**, up to 16 Ki elements of one tensor, and walks it in blocks of 1024 with 4 warps: 8
  elements per thread, which is one 16-byte load of a 16-bit dtype or two of float32. Whole blocks are read without a
  mask, because a mask of unknown length would break the wide loads into single elements; only the last block of a
  tensor has one.
- Snapshots are read in **groups of 4** whose loads do not wait for each other, so a program has 8 to 16 KiB under way.
  Two programs on an SM suffice; 8 fit, and 4 with the spread. The last group is filled up with loads that are switched
  off, so one compiled kernel serves every N; unrolled over N, a window that grows from 2 to 10 snapshots would compile
  nine.
- Addresses, N and coefficients are data, not constants: hundreds of small tensors cost one launch per combination of
  dtypes. Items are small enough that those of a 110M model (6,700) fill 132 SMs several times over, and large enough
  that their table stays below 0.1% of the weights.
- Snapshots are read once, so their lines are the first that the L2 cache gives up.

What the compiler makes of all this is held by tests for three GPUs that need none.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Elements of an item, a multiple of a block, so that every block begins as aligned as its tensor.
ITEM = 16 * 1024
WIDE_ACCESS = 16  # bytes; tensors that do not begin at a multiple of it have a kernel of their own
_BLOCK = 1024
_GROUP = 4
_NUM_WARPS = 4
_TRITON = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def constants(
    in_dtype: torch.dtype | None, out_dtype: torch.dtype, *, double: bool, aligned: bool, spread: bool
) -> dict[str, Any]:
    """What the kernel is compiled for, by the names of its arguments.

    Args:
        in_dtype: Of the snapshots; None: of several dtypes.
        out_dtype: Of what is written.
        double: Sums in float64.
        aligned: All tensors begin at multiples of `WIDE_ACCESS`.
        spread: Also measure it.
    """
    return {
        "out_dtype": _TRITON[out_dtype],
        "in_dtype": None if in_dtype is None else _TRITON[in_dtype],
        "sum_dtype": tl.float64 if double else tl.float32,
        "alignment": WIDE_ACCESS if aligned else 1,
        "spread": spread,
        "block": _BLOCK,
        "group": _GROUP,
    }


def launch_options(*, double: bool, spread: bool) -> dict[str, Any]:
    """How the kernel is compiled, apart from what it computes."""
    # Left to itself, ptxas rounds registers down to the next occupancy and puts a few values into local memory, in the
    # way of the snapshots. So a thread may take all that it needs. An SM has 65,536 registers: 8 programs of 128
    # threads fit, 4 with the spread, 5 and 3 with sums in float64, and two keep the memory busy.
    registers = (168 if spread else 96) if double else (128 if spread else 64)
    return {
        "num_warps": _NUM_WARPS,
        "maxnreg": registers,
        "enable_fp_fusion": True,  # one rounding per term instead of two
    }


# N is data: Triton would compile once more for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_snapshots"])  # type: ignore[untyped-decorator]
def merge_items(  # type: ignore[no-untyped-def]
    rows,
    items,
    coefficients,
    sums,
    num_snapshots,
    out_dtype: tl.constexpr,
    in_dtype: tl.constexpr,
    sum_dtype: tl.constexpr,
    alignment: tl.constexpr,
    spread: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """One program per item: whole blocks first, then the rest under a mask."""
    item = tl.program_id(0)
    row = rows + tl.load(items + 3 * item) * (2 + 2 * num_snapshots)
    begin = tl.load(items + 3 * item + 1)
    length = (tl.load(items + 3 * item + 2) - begin).to(tl.int32)
    whole = length // block * block
    squares = tl.zeros((), tl.float64)
    squared_deviation = tl.zeros((), tl.float64)
    squared_norm = tl.zeros((), tl.float64)
    # Two copies of the block's code, not one with a mask that is sometimes all true: see the module's first point.
    for start in range(0, whole, block):
        first, second, third = _merge_block(
            row, coefficients, num_snapshots, begin + start, block,
            out_dtype, in_dtype, sum_dtype, alignment, spread, False, block, group,
        )  # fmt: skip
        if spread:
            squares += first
            squared_deviation += second
            squared_norm += third
    if whole < length:
        first, second, third = _merge_block(
            row, coefficients, num_snapshots, begin + whole, length - whole,
            out_dtype, in_dtype, sum_dtype, alignment, spread, True, block, group,
        )  # fmt: skip
        if spread:
            squares += first
            squared_deviation += second
            squared_norm += third
    if spread:
        tl.store(sums + 3 * item, squares)
        tl.store(sums + 3 * item + 1, squared_deviation)
        tl.store(sums + 3 * item + 2, squared_norm)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_block(  # type: ignore[no-untyped-def]
    row,
    coefficients,
    num_snapshots,
    start,
    length,
    out_dtype: tl.constexpr,
    in_dtype: tl.constexpr,
    sum_dtype: tl.constexpr,
    alignment: tl.constexpr,
    spread: tl.constexpr,
    masked: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    """Merge `length <= block` elements and return their three sums for the spread (zeros where not asked for)."""
    offsets = tl.arange(0, block)
    inside = offsets < (length if masked else block)
    total = tl.zeros((block,), sum_dtype) * -1.0  # -0.0: a single snapshot then comes back bit for bit
    deviations = tl.zeros((block,), sum_dtype)
    squares = tl.zeros((block,), sum_dtype)
    if spread:
        pivot = _read(row + 2, inside, start, offsets, in_dtype, sum_dtype, alignment)
    for begin in range(0, num_snapshots, group):
        for k in tl.static_range(group):
            snapshot = begin + k
            # Per element, although it is the same for all: the interpreter mistypes a mask that is combined with a
            # scalar.
            exists = tl.zeros((block,), tl.int32) + snapshot < num_snapshots
            # The table has no entry beyond the last snapshot; what is read by its address there is switched off.
            entry = row + 2 + 2 * tl.minimum(snapshot, num_snapshots - 1)
            coefficient = tl.load(coefficients + tl.minimum(snapshot, num_snapshots - 1))
            value = _read(entry, inside & exists, start, offsets, in_dtype, sum_dtype, alignment)
            # Not a coefficient of 0 for what does not exist: 0 * NaN of the last snapshot, and -0.0 + 0.0, are wrong.
            total = tl.where(exists, total + coefficient * value, total)
            if spread:
                deviation = tl.where(exists, value - pivot, 0.0)
                deviations += deviation
                squares += deviation * deviation
    rounded = _round(total, out_dtype)
    pointer = tl.multiple_of(tl.load(row).to(tl.pointer_type(rounded.dtype)) + start, alignment)
    if masked:
        tl.store(pointer + offsets, rounded, mask=inside)
    else:
        tl.store(pointer + offsets, rounded)
    first = tl.zeros((), tl.float64)
    second = tl.zeros((), tl.float64)
    third = tl.zeros((), tl.float64)
    if spread:
        mean = deviations / num_snapshots + pivot
        # A tree of a block's 1024 in their own type, then float64: widening each of them costs registers.
        first += tl.sum(squares).to(tl.float64)
        second += tl.sum(deviations * deviations).to(tl.float64)
        third += tl.sum(mean * mean).to(tl.float64)
    return first, second, third


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    entry, wanted, start, offsets, in_dtype: tl.constexpr, sum_dtype: tl.constexpr, alignment: tl.constexpr
):
    """One block of one snapshot, converted exactly; zeros where not wanted. `entry`: its address and dtype code."""
    address = tl.load(entry)
    if in_dtype is None:  # the snapshots of this tensor differ in dtype
        code = tl.load(entry + 1)
        if code == 0:
            value = _read_as(address, start, offsets, wanted, tl.float32, sum_dtype, alignment)
        elif code == 1:
            value = _read_as(address, start, offsets, wanted, tl.bfloat16, sum_dtype, alignment)
        elif code == 2:
            value = _read_as(address, start, offsets, wanted, tl.float16, sum_dtype, alignment)
        else:
            value = _read_as(address, start, offsets, wanted, tl.float64, sum_dtype, alignment)
    else:
        value = _read_as(address, start, offsets, wanted, in_dtype, sum_dtype, alignment)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _read_as(  # type: ignore[no-untyped-def]
    address, start, offsets, wanted, dtype: tl.constexpr, sum_dtype: tl.constexpr, alignment: tl.constexpr
):
    stored: tl.constexpr = tl.int16 if dtype == tl.bfloat16 else dtype
    # Items and blocks begin at multiples of 16 elements, so the start of a block is as aligned as the tensor.
    pointer = tl.multiple_of(address.to(tl.pointer_type(stored)) + start, alignment)
    value = tl.load(pointer + offsets, mask=wanted, other=0, eviction_policy="evict_first")
    if dtype == tl.bfloat16:  # the upper half of a float32; by its bits, as in `_round`
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(sum_dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _round(total, out_dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """To nearest even; bfloat16 comes back as its bits."""
    if out_dtype == tl.float64:
        rounded = total.to(tl.float64)
    elif out_dtype == tl.bfloat16:
        # Integer arithmetic, the same on every device and in the interpreter, whose own conversion truncates.
        bits = total.to(tl.float32).to(tl.int32, bitcast=True)
        upper = (bits >> 16) & 0xFFFF
        nearest = (bits + 0x7FFF + (upper & 1)) >> 16
        quiet_nan = upper | 0x40  # the addition could carry a NaN over to infinity or zero
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(is_nan, quiet_nan, nearest).to(tl.int16)
    else:
        rounded = total.to(tl.float32).to(out_dtype)
    return rounded
