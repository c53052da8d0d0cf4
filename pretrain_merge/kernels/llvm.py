"""LLVM IR written and compiled in memory: variables, loops and switches on top of llvmlite, then machine code.

Knows nothing of merges. llvmlite has no type annotations, so its values are `Any` here.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

Value = Any
Builder = Any

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()
VOID = ir.VoidType()

CACHE_LINE = 64  # bytes


def converts_float16() -> bool:
    """Whether this CPU converts float16 in hardware; without, LLVM would call routines that are not in this process."""
    triple = str(binding.get_default_triple())
    if triple.startswith("x86_64"):
        return bool(binding.get_host_cpu_features().get("f16c", False))
    return triple.startswith(("aarch64", "arm64"))


def compile_function(module: Value, name: str, *, cpu: str | None = None) -> Callable[..., None]:
    """Machine code of one function of a module.

    Args:
        module: An `llvmlite.ir.Module`.
        name: A function of the module that takes integers and pointers and returns nothing.
        cpu: LLVM's name of the CPU to compile for; by default the one it runs on, with all it can do.

    Returns:
        A function of Python integers. Python's lock is released while it runs.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    # a cross-compiled kernel may only use what its CPU's name promises
    features = binding.get_host_cpu_features().flatten() if cpu is None else ""
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu or binding.get_host_cpu_name(), features=features, opt=3)
    compiled = binding.parse_assembly(str(module))
    compiled.verify()
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(compiled, passes)
    engine = binding.create_mcjit_compiler(compiled, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(module.get_global(name).args))
    function = signature(engine.get_function_address(name))
    function.engine = engine  # type: ignore[attr-defined]  # the machine code lives as long as its engine
    return function


def new_function(
    module: Value, name: str, arguments: Sequence[Value], *, internal: bool = False
) -> tuple[Value, Builder]:
    """A function that returns nothing, and a builder at its beginning."""
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name=name)
    if internal:
        function.linkage = "internal"
        # a call is nothing beside the range of elements that it works on, and compiling the body thrice is not
        function.attributes.add("noinline")
    return function, ir.IRBuilder(function.append_basic_block("entry"))


def integer(value: int) -> Value:
    """A 64-bit constant."""
    return ir.Constant(I64, value)


def element(b: Builder, base: Value, index: Value, size: int) -> Value:
    """Address of an element of `size` bytes."""
    return b.gep(base, [b.mul(index, integer(size))], source_etype=ir.IntType(8))


def load_integer(b: Builder, base: Value, index: Value) -> Value:
    """An element of a table of 64-bit integers."""
    return b.load(element(b, base, index, 8), typ=I64)


def minimum(b: Builder, left: Value, right: Value) -> Value:
    """The smaller of two signed integers."""
    return b.select(b.icmp_signed("<", left, right), left, right)


def stack(b: Builder, kind: Value) -> Value:
    """Memory for one value of this type; LLVM keeps it in registers where it can."""
    with b.goto_entry_block():  # elsewhere, a loop would take new memory in every turn
        slot = b.alloca(kind)
    slot.align = CACHE_LINE
    slot.type = POINTER  # llvmlite still gives it a typed pointer, which LLVM no longer has
    return slot


def variable(b: Builder, value: Value) -> Value:
    """Address of a variable that starts with this value."""
    slot = stack(b, value.type)
    b.store(value, slot)
    return slot


@contextmanager
def loop(b: Builder, start: Value, stop: Value, step: int) -> Iterator[Value]:
    """Emit `for (i = start; i < stop; i += step)`; the body is what is emitted inside the `with`."""
    counter = variable(b, start)
    head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    index = b.load(counter, typ=I64)
    b.cbranch(b.icmp_signed("<", index, stop), body, after)
    b.position_at_end(body)
    yield index
    b.store(b.add(index, integer(step)), counter)
    b.branch(head)
    b.position_at_end(after)


def cases(b: Builder, selector: Value, values: Sequence[int]) -> Iterator[int]:
    """Emit a switch: yields each value with the builder inside its case. The first one is also the default."""
    blocks = [b.append_basic_block("case") for _ in values]
    after = b.append_basic_block("after")
    switch = b.switch(selector, blocks[0])
    for value, block in zip(values[1:], blocks[1:], strict=True):
        switch.add_case(integer(value), block)
    for value, block in zip(values, blocks, strict=True):
        b.position_at_end(block)
        yield value
        b.branch(after)
    b.position_at_end(after)
