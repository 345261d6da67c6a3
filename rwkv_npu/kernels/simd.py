"""Vectors of 64 bytes as numba types, with operations on them that emit LLVM code.

A vector is a value like a number. An address is an integer, in bytes. An operation is one LLVM instruction of the full
width, which LLVM splits over the registers of the processor: one on AVX-512, two on AVX2, four on NEON. Only for int8
products are the instructions chosen by hand, in `instruction_sets.py`.

    Ints   16 int32         Floats   16 float32         lane   one of the 16
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from rwkv_npu.kernels import processor
from rwkv_npu.kernels.compiler import PLAIN
from rwkv_npu.quant.cpu import LANES

processor.configure()

VECTOR_BYTES = 64

_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_F32 = ir.FloatType()


class Vector(types.Type):
    """A vector of `count` elements of an LLVM type."""

    def __init__(self, name: str, element: Any, count: int):
        self.llvm = ir.VectorType(element, count)
        super().__init__(name)


class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, vector.llvm)


register_model(Vector)(_VectorModel)

Ints = Vector("Ints", _I32, LANES)
Floats = Vector("Floats", _F32, LANES)
ADDRESS = types.intp

_triple = llvmlite.binding.get_process_triple()
WIDE = "avx512f" in processor.features()  # 32 registers of the full width


def operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function (builder, *values) -> value or None that emits LLVM code: compiled code can then call it."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        def typed(_context: Any, *given: Any) -> Any:
            return result(*arguments), code

        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        # numba binds the arguments of a call by the names in a signature.
        names = ["context", *(f"argument{i}" for i in range(len(arguments)))]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return decorate


def pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def read(builder: Any, address: Any, kind: Any) -> Any:
    """Load a value of LLVM type `kind`. The address need not be aligned."""
    value = builder.load(pointer(builder, address, kind))
    value.align = 1
    return value


def write(builder: Any, address: Any, value: Any) -> None:
    """Store a value. The address need not be aligned."""
    builder.store(value, pointer(builder, address, value.type)).align = 1


def spread(builder: Any, value: Any, count: int = LANES) -> Any:
    """A scalar in every lane."""
    kind = ir.VectorType(value.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(first, first, _mask([0] * count))


def _mask(places: Iterable[int]) -> Any:
    """The mask of a shuffle that takes the elements at these places."""
    chosen = list(places)
    return ir.Constant(ir.VectorType(_I32, len(chosen)), chosen)


def constant(vector: Vector, value: float) -> Any:
    return ir.Constant(vector.llvm, [value] * vector.llvm.count)


def call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def read_bfloats(builder: Any, address: Any) -> Any:
    """16 bfloat16 as Floats: a bfloat16 is the upper half of a float32."""
    wide = builder.zext(read(builder, address, ir.VectorType(_I16, LANES)), Ints.llvm)
    return builder.bitcast(builder.shl(wide, constant(Ints, 16)), Floats.llvm)


def take(builder: Any, v: Any, places: Iterable[int], other: Any = None) -> Any:
    """Elements of a vector, or of two: the elements of `other` are counted after those of v."""
    return builder.shuffle_vector(v, v if other is None else other, _mask(places))


def concatenate(builder: Any, parts: list[Any]) -> Any:
    """Join vectors, as many as a power of two, into one."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [take(builder, v, range(2 * v.type.count), w) for v, w in pairs]
    return parts[0]


def hidden(builder: Any, value: Any) -> Any:
    """The same value, of which LLVM no longer knows that it is a constant."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)


def loop(
    builder: Any, count: int, values: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Emit a loop of `count` rounds (an int64, at least 1) of `values = body(round, values)`; the values after it."""
    before = builder.block
    head, after = builder.append_basic_block("round"), builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    number, phis = builder.phi(_I64), [builder.phi(value.type) for value in values]
    results = body(number, phis)
    following = builder.add(number, _I64(1))
    for phi, first, again in zip([number, *phis], [_I64(0), *values], [following, *results], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), head, after)
    builder.position_at_end(after)
    return results


# -- operations --------------------------------------------------------------------------------------------


@operation(Floats, ADDRESS)
def load_floats(b: Any, address: Any) -> Any:
    return read(b, address, Floats.llvm)


@operation(types.void, Floats, ADDRESS)
def store_floats(b: Any, v: Any, address: Any) -> None:
    write(b, address, v)


@operation(Floats, ADDRESS)
def load_halves(b: Any, address: Any) -> Any:
    """16 float16, widened."""
    return b.fpext(read(b, address, ir.VectorType(ir.HalfType(), LANES)), Floats.llvm)


@operation(types.void, Floats, ADDRESS)
def store_halves(b: Any, v: Any, address: Any) -> None:
    """16 float16, rounded to nearest."""
    write(b, address, b.fptrunc(v, ir.VectorType(ir.HalfType(), LANES)))


@operation(Floats, ADDRESS)
def load_bfloats(b: Any, address: Any) -> Any:
    """16 bfloat16, widened."""
    return read_bfloats(b, address)


@operation(types.float32, ADDRESS)
def load_float(b: Any, address: Any) -> Any:
    return read(b, address, _F32)


@operation(types.void, types.float32, ADDRESS)
def store_float(b: Any, value: Any, address: Any) -> None:
    write(b, address, value)


@operation(types.int64, ADDRESS)
def load_long(b: Any, address: Any) -> Any:
    return read(b, address, _I64)


@operation(types.void, types.int64, ADDRESS)
def store_long(b: Any, value: Any, address: Any) -> None:
    write(b, address, value)


@operation(Floats, types.float32)
def floats(b: Any, x: Any) -> Any:
    return spread(b, x)


@operation(Floats, Floats, Floats)
def add(b: Any, x: Any, y: Any) -> Any:
    return b.fadd(x, y)


@operation(Floats, Floats, Floats)
def sub(b: Any, x: Any, y: Any) -> Any:
    return b.fsub(x, y)


@operation(Floats, Floats, Floats)
def mul(b: Any, x: Any, y: Any) -> Any:
    return b.fmul(x, y)


@operation(Floats, Floats, Floats)
def div(b: Any, x: Any, y: Any) -> Any:
    return b.fdiv(x, y)


@operation(Floats, Floats, Floats, Floats)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the processor can."""
    return call(b, "llvm.fmuladd.v16f32", Floats.llvm, x, y, z)


@operation(Floats, Floats)
def absolute(b: Any, v: Any) -> Any:
    return call(b, "llvm.fabs.v16f32", Floats.llvm, v)


@operation(Floats, Floats, Floats)
def at_least(b: Any, v: Any, bound: Any) -> Any:
    """The larger of both; NaN where v is NaN, whatever `bound` is."""
    return b.select(b.fcmp_ordered("<", v, bound), bound, v)


@operation(Floats, Floats, Floats)
def at_most(b: Any, v: Any, bound: Any) -> Any:
    """The smaller of both; NaN where v is NaN, whatever `bound` is."""
    return b.select(b.fcmp_ordered(">", v, bound), bound, v)


@operation(types.float32, Floats)
def total(b: Any, v: Any) -> Any:
    """The sum of the lanes."""
    return _reduce(b, v, b.fadd)


@operation(Floats, Floats, Floats)
def larger(b: Any, x: Any, y: Any) -> Any:
    """The larger of both; NaN where either is NaN."""
    return call(b, "llvm.maximum.v16f32", Floats.llvm, x, y)


@operation(Floats, Floats, Floats)
def larger_magnitude(b: Any, x: Any, y: Any) -> Any:
    """NaN where either is. Bits of magnitudes are ordered as integers are, which takes one instruction."""
    x, y = (b.and_(b.bitcast(v, Ints.llvm), constant(Ints, 0x7FFFFFFF)) for v in (x, y))
    return b.bitcast(b.select(b.icmp_signed(">", x, y), x, y), Floats.llvm)


@operation(types.float32, Floats)
def largest(b: Any, v: Any) -> Any:
    """The largest lane; NaN if any lane is NaN."""
    return _reduce(b, v, lambda x, y: call(b, f"llvm.maximum.v{x.type.count}f32", x.type, x, y))


def _reduce(b: Any, v: Any, combine: Callable[[Any, Any], Any]) -> Any:
    while v.type.count > 1:
        half = v.type.count // 2
        masks = [_mask(range(s, s + half)) for s in (0, half)]
        v = combine(*(b.shuffle_vector(v, v, mask) for mask in masks))
    return b.extract_element(v, _I32(0))


@operation(Floats, Floats)
def rounded(b: Any, v: Any) -> Any:
    """Round to the nearest whole number, halves to even."""
    return call(b, "llvm.rint.v16f32", Floats.llvm, v)


# -- exponentials ------------------------------------------------------------------------------------------
# x = n ln 2 + f with a whole n and |f| <= ln 2 / 2, so exp x = 2^n exp f. Adding 1.5 * 2^23 rounds a float32 to a whole
# number and leaves that number in its last bits. A shift moves it to the exponent. LLVM's own conversion to integers is
# slow: it handles NaN and overflow, on AVX2 one number at a time.

_WHOLE = 1.5 * 2**23
_WHOLE_BITS = 0x4B400000


def whole(b: Any, v: Any) -> Any:
    """Floats that are whole numbers, smaller than 2^22 -> Ints. NaN becomes any number."""
    return b.sub(b.bitcast(b.fadd(v, constant(Floats, _WHOLE)), Ints.llvm), constant(Ints, _WHOLE_BITS))


@operation(types.void, Floats, ADDRESS)
def store_small_ints(b: Any, v: Any, address: Any) -> None:
    """Store 16 whole numbers of -128 .. 127 as signed bytes. NaN becomes any of them."""
    write(b, address, b.trunc(whole(b, v), ir.VectorType(_I8, LANES)))


@operation(Floats, Floats)
def _power_of_two(b: Any, shifted: Any) -> Any:
    """2^n for a vector that holds n + 1.5 * 2^23."""
    bits = b.shl(b.bitcast(shifted, Ints.llvm), constant(Ints, 23))
    return b.bitcast(b.add(bits, constant(Ints, 127 << 23)), Floats.llvm)


@njit(forceinline=True, **PLAIN)
def exp(x):  # type: ignore[no-untyped-def]
    """e^x within 1.1 units in the last place, limited to 2^-126 .. 2^127: never 0 nor infinite. NaN stays NaN."""
    x = at_most(at_least(x, floats(-87.3)), floats(88.3))
    shifted = fma(x, floats(1.44269504), floats(_WHOLE))
    n = sub(shifted, floats(_WHOLE))
    # ln 2 comes in two parts. The product of n and the first is exact.
    f = fma(n, floats(2.12194440e-4), fma(n, floats(-0.693359375), x))
    p = fma(f, floats(1 / 5040), floats(1 / 720))
    p = fma(f, fma(f, p, floats(1 / 120)), floats(1 / 24))
    p = fma(f, fma(f, p, floats(1 / 6)), floats(1 / 2))
    p = add(floats(1.0), fma(mul(f, f), p, f))
    return mul(p, _power_of_two(shifted))


@njit(forceinline=True, **PLAIN)
def sigmoid(x):  # type: ignore[no-untyped-def]
    return div(floats(1.0), add(floats(1.0), exp(mul(x, floats(-1.0)))))


@njit(forceinline=True, **PLAIN)
def tanh(x):  # type: ignore[no-untyped-def]
    return sub(mul(sigmoid(mul(x, floats(2.0))), floats(2.0)), floats(1.0))


# -- calls and arrays --------------------------------------------------------------------------------------


def kernel_caller(arguments: int) -> Any:
    """Make an operation that calls the kernel at an address with this many arguments."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * arguments)

    @operation(types.void, ADDRESS, *[types.int64] * arguments)
    def call_kernel(b: Any, address: Any, *values: Any) -> None:
        b.call(b.inttoptr(address, kind.as_pointer()), values)

    return call_kernel


def pointer_to(element: Any) -> Any:
    """Make an operation that turns an address into a pointer to elements of a numba type, as `carray` takes it."""
    kind = types.CPointer(element)

    @intrinsic
    def as_pointer(_context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(kind))

        return kind(types.int64), code

    return as_pointer


# -- threads -----------------------------------------------------------------------------------------------


@operation(types.int64, ADDRESS, types.int64)
def add_atomically(b: Any, address: Any, number: Any) -> Any:
    """Add to an int64 that threads share and return its old value. Threads that see it see all earlier writes."""
    return b.atomic_rmw("add", pointer(b, address, _I64), number, "seq_cst")


@operation(types.int64, ADDRESS)
def read_atomically(b: Any, address: Any) -> Any:
    return b.load_atomic(pointer(b, address, _I64), "seq_cst", 8)


@operation(types.void, ADDRESS, types.int64)
def write_atomically(b: Any, address: Any, number: Any) -> None:
    b.store_atomic(number, pointer(b, address, _I64), "seq_cst", 8)


@operation(types.void)
def pause(b: Any) -> None:
    """Tell the processor that this loop waits for another thread."""
    if _triple.startswith(("aarch64", "arm64")):
        call(b, "llvm.aarch64.hint", ir.VoidType(), _I32(1))
    elif _triple.startswith("x86_64"):
        call(b, "llvm.x86.sse2.pause", ir.VoidType())
