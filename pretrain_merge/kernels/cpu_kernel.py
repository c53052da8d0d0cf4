"""The CPU kernel: a weighted sum of many streams in one pass, written as LLVM IR and compiled in memory.

Knows tables of addresses and the instructions between a load and a store; knows no tensors and no threads. llvmlite
brings LLVM along, so no compiler is needed on the user's machine, nothing is written to disk, and one function
(compiled in 0.2 s) serves every number of snapshots and every mix of dtypes. Its loops, outermost first:

- **items**: pieces of tensors. Threads that run the kernel at the same time take the next one from a shared counter.
- **blocks** of elements whose accumulators fit into half of an L1 cache.
- **groups** of at most 12 snapshots. 64 streams at a time are more than a core can follow (prefetchers, TLB, cache
  ways): 3.3 times the time of a copy without groups, 1.1 with them. From group to group the accumulators wait in L1.
- **vectors** of 32 elements: a whole cache line at least, and four AVX-512 or eight AVX2 or NEON registers of
  accumulators.
- **snapshots** of the group: load, convert, multiply, add.

The output is stored past the cache (non-temporally), so its old lines need not be read first, which saves 10 to 15% of
a merge of 10. Such stores want an aligned address. Elements before the output's first 64-byte boundary, and those after
the last whole vector, go through the same code with vectors of one.
"""

from collections.abc import Callable

from llvmlite import ir

from pretrain_merge.kernels.cpu_vectors import (
    FUSED,
    Row,
    Vectors,
    accumulate,
    add_up,
    broadcast,
    emit_load,
    emit_store,
    squared_halves,
)
from pretrain_merge.kernels.llvm import (
    CACHE_LINE,
    DOUBLE,
    FLOAT,
    I64,
    POINTER,
    Builder,
    Value,
    compile_function,
    element,
    integer,
    load_integer,
    loop,
    minimum,
    new_function,
    stack,
    variable,
)
from pretrain_merge.kernels.tables import ITEM_WIDTH, SIZES, SUMS_WIDTH

_LANES = 32
_GROUP = 12
_BUFFER = 16 * 1024  # bytes: half of an L1 cache, of which the streams need the rest

Kernel = Callable[..., None]


def compile_kernel(*, double: bool, spread: bool, paired: bool = False, cpu: str | None = None) -> Kernel:
    """Compile the kernel for one accumulator dtype.

    Args:
        double: Accumulate in float64, else in float32 (then nothing in the tables may be float64).
        spread: Also fill the table of sums.
        paired: Nothing but bfloat16 is in the tables, and the accumulators are float32.
        cpu: LLVM's name of the CPU to compile for; the one it runs on by default.

    Returns:
        `kernel(rows, items, num_items, counter, coefficients, num_snapshots, sums)`: addresses of the tables of
        `tables.py`, of an int64 counter that starts at 0, and of N coefficients of the accumulator dtype.
    """
    return compile_function(_build(double=double, spread=spread, paired=paired), "merge", cpu=cpu)


def _build(*, double: bool, spread: bool, paired: bool) -> Value:
    module = ir.Module(name="weighted_sum")
    scalar = DOUBLE if double else FLOAT
    vectors, singles = (_emit_range(module, lanes, scalar, spread=spread, paired=paired) for lanes in (_LANES, 1))
    merge, b = new_function(module, "merge", [POINTER, POINTER, I64, POINTER, POINTER, I64, POINTER])
    rows, items, num_items, counter, coefficients, num_snapshots, sums = merge.args
    take, work, done = (merge.append_basic_block(name) for name in ("take", "work", "done"))
    b.branch(take)
    b.position_at_end(take)
    item = b.atomic_rmw("add", counter, integer(1), ordering="monotonic")
    b.cbranch(b.icmp_signed("<", item, num_items), work, done)
    b.position_at_end(work)
    fields = element(b, items, item, 8 * ITEM_WIDTH)
    index, begin, end = (load_integer(b, fields, integer(k)) for k in range(ITEM_WIDTH))
    width = b.add(integer(2), b.mul(integer(2), num_snapshots))
    row = Row(element(b, rows, b.mul(index, width), 8), coefficients, num_snapshots)
    item_sums = element(b, sums, item, 8 * SUMS_WIDTH)
    body, tail = _emit_alignment(b, row, begin, end)
    for function, first, last in ((singles, begin, body), (vectors, body, tail), (singles, tail, end)):
        b.call(function, [*row, first, last, item_sums])
    b.branch(take)
    b.position_at_end(done)
    b.fence("seq_cst")  # non-temporal stores are weakly ordered: visible to all before the threads are joined
    b.ret_void()
    return module


def _emit_alignment(b: Builder, row: Row, begin: Value, end: Value) -> tuple[Value, Value]:
    """First and last boundary of whole vectors between `begin` and `end`, so that the output is aligned at both."""
    code = load_integer(b, row.addresses, integer(1))
    size = integer(SIZES[0])
    for other in list(SIZES)[1:]:
        size = b.select(b.icmp_signed("==", code, integer(other)), integer(SIZES[other]), size)
    address = b.add(load_integer(b, row.addresses, integer(0)), b.mul(begin, size))
    bytes_before = b.and_(b.neg(address), integer(CACHE_LINE - 1))
    elements_before, rest = b.sdiv(bytes_before, size), b.srem(bytes_before, size)
    length = b.sub(end, begin)
    # An address that is not a multiple of the element's size never meets a boundary: one element at a time to the end.
    meets = b.and_(b.icmp_signed("==", rest, integer(0)), b.icmp_signed("<", elements_before, length))
    body = b.add(begin, b.select(meets, elements_before, length))
    num_vectors = b.sdiv(b.sub(end, body), integer(_LANES))
    return body, b.add(body, b.mul(num_vectors, integer(_LANES)))


def _emit_range(module: Value, lanes: int, scalar: Value, *, spread: bool, paired: bool) -> Value:
    """A function that merges elements [begin, end) of a row, a multiple of `lanes`, and adds to its three sums."""
    function, b = new_function(module, f"merge_{lanes}", [POINTER, POINTER, I64, I64, I64, POINTER], internal=True)
    row, (begin, end, item_sums) = Row(*function.args[:3]), function.args[3:]
    v = Vectors(b, scalar, lanes, spread, paired)
    length = _BUFFER // v.size // (2 if spread else 1)
    buffers = [stack(b, ir.ArrayType(v.scalar, length)) for _ in range(2 if spread else 1)]
    sums = [variable(b, v.narrowed().constant(DOUBLE, 0.0)) for _ in range(SUMS_WIDTH)] if spread else []
    with loop(b, begin, end, length) as block:
        block_end = minimum(b, b.add(block, integer(length)), end)
        with loop(b, integer(0), row.num_snapshots, _GROUP) as group:
            group_end = minimum(b, b.add(group, integer(_GROUP)), row.num_snapshots)
            with loop(b, block, block_end, lanes) as position:
                # one buffer, cut anew for each block: it stays in L1 from group to group
                waiting = [element(b, buffer, b.sub(position, block), v.size) for buffer in buffers]
                _emit_vector(v, row, position, (group, group_end), waiting, sums)
    if spread:
        wide = v.narrowed().of(DOUBLE)
        name = f"llvm.vector.reduce.fadd.v{wide.count}f64"
        add_lanes = module.globals.get(name) or ir.Function(module, ir.FunctionType(DOUBLE, [DOUBLE, wide]), name)
        for k, total in enumerate(sums):
            slot = element(b, item_sums, integer(k), 8)
            b.store(b.call(add_lanes, [b.load(slot, typ=DOUBLE), b.load(total, typ=wide)]), slot)
    b.ret_void()
    return function


def _emit_vector(
    v: Vectors, row: Row, position: Value, group: tuple[Value, Value], waiting: list[Value], sums: list[Value]
) -> None:
    """One vector of one group: go on with the sums, then let them wait or, after the last group, write the output.

    For the spread, deviations from the oldest snapshot are summed like the merge, and their squares go into `sums`.
    """
    b = v.b
    # -0.0 is the neutral element of addition: a single snapshot with coefficient 1 then comes back bit for bit.
    totals = [variable(b, v.constant(v.scalar, -0.0)) for _ in waiting]
    with b.if_then(b.icmp_signed(">", group[0], integer(0))):
        for total, slot in zip(totals, waiting, strict=True):
            b.store(b.load(slot, typ=v.of(v.scalar), align=v.alignment), total)
    pivot = emit_load(v, row, integer(0), position) if v.spread else None
    squares = variable(b, v.halved().constant(v.scalar, 0.0))
    with loop(b, *group, 1) as snapshot:
        value = emit_load(v, row, snapshot, position)
        coefficient = b.load(element(b, row.coefficients, snapshot, v.size), typ=v.scalar)
        accumulate(b, totals[0], value, broadcast(v, coefficient))
        if v.spread:
            deviation = b.fsub(value, pivot)
            b.store(b.fadd(b.load(totals[1], typ=deviation.type), deviation), totals[1])
            # Halves together: one accumulator less for each, and the loop's sums stay in AVX2's 16 registers.
            square = squared_halves(v, deviation)
            b.store(b.fadd(b.load(squares, typ=square.type), square), squares)
    results = [b.load(total, typ=v.of(v.scalar)) for total in totals]
    if v.spread:
        add_up(v.halved(), sums[0], b.load(squares, typ=v.halved().of(v.scalar)))
    with b.if_else(b.icmp_signed("<", group[1], row.num_snapshots)) as (to_be_continued, complete):
        with to_be_continued:
            for result, slot in zip(results, waiting, strict=True):
                b.store(result, slot, align=v.alignment)
        with complete:
            emit_store(v, row, position, results[0])
            if v.spread:
                share = b.fdiv(ir.Constant(v.scalar, 1.0), b.sitofp(row.num_snapshots, v.scalar))
                mean = b.fadd(b.fmul(results[1], broadcast(v, share), flags=FUSED), pivot, flags=FUSED)
                for total, part in zip(sums[1:], (results[1], mean), strict=True):
                    add_up(v, total, b.fmul(part, part))
