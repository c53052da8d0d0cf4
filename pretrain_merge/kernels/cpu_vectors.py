"""What the CPU kernel does with one vector: loads and exact conversions, rounding and stores, sums over lanes.

Knows the instructions of a vector of any number of lanes. Knows no loops and no threads.
"""

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir

from pretrain_merge.kernels.llvm import (
    CACHE_LINE,
    DOUBLE,
    FLOAT,
    HALF,
    I16,
    I32,
    POINTER,
    Builder,
    Value,
    cases,
    integer,
    load_integer,
    variable,
)
from pretrain_merge.kernels.tables import CODES, SIZES

_SUM_LANES = 8  # of the spread's float64 sums: two AVX2 registers each
_BFLOAT16, _FLOAT16, _FLOAT64 = CODES["bfloat16"], CODES["float16"], CODES["float64"]
_STORED = {CODES["float32"]: FLOAT, _BFLOAT16: I16, _FLOAT16: HALF, _FLOAT64: DOUBLE}  # how a dtype is loaded
FUSED = ("contract",)  # a product and a sum may become one instruction, with one rounding, where the CPU has it


class Vectors(NamedTuple):
    """How a function computes.

    Attributes:
        b: Where its instructions go.
        scalar: Type of an accumulator.
        lanes: Accumulators in a vector.
        spread: Whether it measures the spread as well.
        paired: Whether everything in the tables is bfloat16. Two of them in 32 bits are widened by one shift (the even
            one) and one mask (the odd one), half of what it takes to spread them out first; so the lower half of the
            lanes has the even elements, the upper half the odd ones.
    """

    b: Builder
    scalar: Value
    lanes: int
    spread: bool
    paired: bool

    def of(self, scalar: Value) -> Value:
        """The type of a vector of such scalars."""
        return ir.VectorType(scalar, self.lanes)

    def constant(self, scalar: Value, value: float) -> Value:
        """One value in every lane."""
        return ir.Constant(self.of(scalar), [value] * self.lanes)

    def halved(self) -> "Vectors":
        """Of half the lanes."""
        return self._replace(lanes=max(1, self.lanes // 2))

    def narrowed(self) -> "Vectors":
        """Of the lanes that sums for the spread have."""
        return self._replace(lanes=min(self.lanes, _SUM_LANES))

    @property
    def codes(self) -> Sequence[int]:
        """The dtypes that the tables may name."""
        if self.paired:
            return [_BFLOAT16]
        return [code for code in _STORED if code != _FLOAT64 or self.scalar == DOUBLE]

    @property
    def size(self) -> int:
        """Bytes of an accumulator."""
        return 8 if self.scalar == DOUBLE else 4

    @property
    def alignment(self) -> int:
        """Of a vector in memory of our own, and of the output: whole vectors begin at its boundaries."""
        return CACHE_LINE if self.lanes > 1 else 1


class Row(NamedTuple):
    """What a vector's sum is made of: one row of addresses, and what multiplies them."""

    addresses: Value
    coefficients: Value
    num_snapshots: Value


def emit_load(v: Vectors, row: Row, snapshot: Value, position: Value) -> Value:
    """Elements of one snapshot, converted exactly to the accumulator's type."""
    b = v.b
    column = b.add(integer(2), b.mul(integer(2), snapshot))
    address = load_integer(b, row.addresses, column)
    if v.paired and v.lanes > 1:
        return _load_pairs(v, b.inttoptr(b.add(address, b.mul(position, integer(SIZES[_BFLOAT16]))), POINTER))
    result = variable(b, v.constant(v.scalar, 0.0))
    for code in cases(b, load_integer(b, row.addresses, b.add(column, integer(1))), v.codes):
        pointer = b.inttoptr(b.add(address, b.mul(position, integer(SIZES[code]))), POINTER)
        value = b.load(pointer, typ=v.of(_STORED[code]), align=1)
        if code == _BFLOAT16:  # the upper half of a float32
            value = b.bitcast(b.shl(b.zext(value, v.of(I32)), v.constant(I32, 16)), v.of(FLOAT))
        b.store(value if value.type == v.of(v.scalar) else b.fpext(value, v.of(v.scalar)), result)
    return b.load(result, typ=v.of(v.scalar))


def _load_pairs(v: Vectors, pointer: Value) -> Value:
    b, pairs = v.b, v.halved()
    words = b.load(pointer, typ=pairs.of(I32), align=1)
    even = b.shl(words, pairs.constant(I32, 16))
    odd = b.and_(words, pairs.constant(I32, -(1 << 16)))
    lanes = ir.Constant(v.of(I32), list(range(v.lanes)))
    return b.bitcast(b.shuffle_vector(even, odd, lanes), v.of(FLOAT))


def emit_store(v: Vectors, row: Row, position: Value, value: Value) -> None:
    """Round to nearest even and write, whole vectors past the cache."""
    b = v.b
    address = load_integer(b, row.addresses, integer(0))
    for code in cases(b, load_integer(b, row.addresses, integer(1)), v.codes):
        rounded = value
        # as torch rounds: float64 to a 16-bit dtype goes through float32 there too
        if v.scalar == DOUBLE and code != _FLOAT64:
            rounded = b.fptrunc(rounded, v.of(FLOAT))
        if code == _FLOAT16:
            rounded = b.fptrunc(rounded, v.of(HALF))
        if code == _BFLOAT16:
            rounded = _round_to_bfloat16(v, rounded)
            if v.paired and v.lanes > 1:
                in_order = [half + k for k in range(v.lanes // 2) for half in (0, v.lanes // 2)]
                rounded = b.shuffle_vector(rounded, rounded, ir.Constant(v.of(I32), in_order))
        pointer = b.inttoptr(b.add(address, b.mul(position, integer(SIZES[code]))), POINTER)
        store = b.store(rounded, pointer, align=v.alignment)
        if v.lanes > 1:
            store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def _round_to_bfloat16(v: Vectors, value: Value) -> Value:
    """Nearest even in integer arithmetic: the CPU's own instruction, where there is one, flushes subnormals to zero."""
    b = v.b
    bits = b.bitcast(value, v.of(I32))
    upper = b.lshr(bits, v.constant(I32, 16))
    is_odd = b.and_(upper, v.constant(I32, 1))
    nearest = b.lshr(b.add(b.add(bits, v.constant(I32, 0x7FFF)), is_odd), v.constant(I32, 16))
    quiet_nan = b.or_(upper, v.constant(I32, 0x40))  # the addition could carry a NaN over to infinity or zero
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(is_nan, quiet_nan, nearest), v.of(I16))


def accumulate(b: Builder, total: Value, left: Value, right: Value) -> None:
    """`total += left * right`."""
    product = b.fmul(left, right, flags=FUSED)
    b.store(b.fadd(b.load(total, typ=left.type), product, flags=FUSED), total)


def squared_halves(v: Vectors, value: Value) -> Value:
    """Squares, the upper half of the lanes added to the lower: half the lanes."""
    if v.lanes == 1:
        return v.b.fmul(value, value)
    lower, upper = _halves(v, value)
    return v.b.fadd(v.b.fmul(lower, lower, flags=FUSED), v.b.fmul(upper, upper, flags=FUSED), flags=FUSED)


def _halves(v: Vectors, value: Value) -> tuple[Value, Value]:
    lanes = v.lanes // 2
    lower, upper = (ir.Constant(ir.VectorType(I32, lanes), list(range(k, k + lanes))) for k in (0, lanes))
    return v.b.shuffle_vector(value, value, lower), v.b.shuffle_vector(value, value, upper)


def add_up(v: Vectors, total: Value, value: Value) -> None:
    """Add a vector to a float64 sum of fewer lanes.

    Halves are added in the vector's own type first. Widening every lane would cost more than all else that the spread
    does, and hold a merge of 16-bit snapshots up by half.
    """
    b = v.b
    # pairwise, so the error grows with the logarithm of the lanes
    while v.lanes > _SUM_LANES:
        value = b.fadd(*_halves(v, value))
        v = v.halved()
    wide = value if v.scalar == DOUBLE else b.fpext(value, v.of(DOUBLE))
    b.store(b.fadd(b.load(total, typ=wide.type), wide), total)


def broadcast(v: Vectors, scalar: Value) -> Value:
    """A scalar in every lane."""
    nothing = ir.Constant(v.of(scalar.type), ir.Undefined)
    first = v.b.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return v.b.shuffle_vector(first, nothing, v.constant(I32, 0))
