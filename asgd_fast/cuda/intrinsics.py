"""What Numba does not have: memory by its address, vectors, operations that round where they stand.

All code that emits LLVM stands here. Each operation is made for the GPU or for the CPU, since the
kernels' body is compiled for both: so a machine without a GPU can check its bits. This module does
not know what is computed.

A vector is a value of some lanes of float32 or float64, whatever the numbers are in memory. Lanes
are operated on one by one: LLVM has no vectors of operations that nothing may contract.
"""

from __future__ import annotations

from functools import wraps
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llvmlite import ir
from llvmlite.ir.values import ArgumentAttributes
from numba import types

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ACCESS", "SIZES", "Vector", "Words", "computed", "make"]

Target: TypeAlias = Literal["cuda", "cpu"]

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()

# Each number as LLVM loads and stores it. NVVM knows no bfloat16, which goes as integers.
_STORED = {
    "float16": ir.HalfType(),
    "bfloat16": _I16,
    "float32": _FLOAT,
    "float64": _DOUBLE,
    "bits16": _I16,
    "bits32": _I32,
    "bits64": _I64,
}

# The size of a number in memory, in bytes.
SIZES = {dtype: int(dtype[-2:]) // 8 for dtype in _STORED}

# The largest access of one thread, in bytes.
ACCESS = 16


def computed(dtype: str) -> str:
    """Return the dtype of the lanes that numbers in memory become."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


class Vector(types.Type):
    """The type of n lanes of a dtype: "float32", "float64", or bits that are only moved."""

    def __init__(self, dtype: str, n: int) -> None:
        self.dtype: str = dtype
        self.n: int = n
        super().__init__(name=f"Vector({dtype}, {n})")


class Words(types.Type):
    """The type of n 64-bit words which a kernel gets by value, among its parameters."""

    def __init__(self, n: int) -> None:
        self.n = n
        super().__init__(name=f"Words({n})")


class _ByValue(ArgumentAttributes):
    """The attributes of a parameter that is passed by value, in either of NVVM's dialects."""

    def __init__(self, names_type: bool) -> None:
        super().__init__()
        self._names_type = names_type

    def _to_list(self, typ: Any) -> list[str]:
        return [f"byval({typ.pointee})" if self._names_type else "byval", "align 8"]


def make(target: Target, compute_capability: tuple[int, int] = (7, 5)) -> SimpleNamespace:
    """Return the operations for a target.

    Parameters
    ----------
    target : {"cuda", "cpu"}
    compute_capability : tuple of int
        Of the GPU.

    Returns
    -------
    SimpleNamespace
        Decorator: ``function``, for the functions that use the rest.

        Words, all int64: ``word(words, i)`` of the kernel's parameter (for the CPU: of its
        address); ``real[dtype](word)`` has the bits of the word, or of its lower half.

        Memory: ``memory(dtype, lanes, parts, stride)`` makes two functions: ``load(array, i)`` and
        ``store(array, i, vector)``, of the address of an array and a number's place there. Each
        part is of `lanes` numbers that follow each other, which are aligned to 16 bytes if there
        are more than one; parts are `stride` numbers apart. The lanes are of the dtype `computed`.

        Arithmetic on vectors, on a vector and numbers, or on two numbers of one type: ``add``,
        ``sub``, ``mul``, each rounded once; ``fma`` with a vector last; ``select(condition, x,
        y)``; ``convert(dtype)`` and ``rounded(dtype)`` make functions of a vector.

        Scalars in memory: ``read_real[dtype](address)``, ``write_real[dtype](address, x)``, and for
        the GPU ``ticket(address, last)``, which counts its calls up to `last` and begins anew.
    """
    if target == "cuda":
        from numba import cuda
        from numba.cuda.datamodel import models
        from numba.cuda.extending import intrinsic, register_model

        # As a function of the device Numba would ask for one.
        function = cuda.jit(device=True, inline="always", debug=False, opt=True)
    else:
        from numba import njit
        from numba.core.datamodel import models
        from numba.core.extending import intrinsic, register_model

        function = njit(error_model="numpy")  # as on the GPU, a division by 0 raises nothing
    with _registering:
        if target not in _registered:
            _register_models(models, register_model)
            _registered.add(target)
    machine = _Machine(target, compute_capability)

    def operation(typed: Callable[..., Any], emit: Callable[..., Any]) -> Any:
        """Return an operation of the signature `typed`, which `emit` makes of LLVM's values."""

        @intrinsic
        @wraps(typed)
        def typed_and_emitted(*kinds: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                result = emit(builder, *args)
                is_void = signature.return_type == types.void
                return context.get_dummy_value() if is_void else result

            return typed(*kinds), codegen

        return typed_and_emitted

    return SimpleNamespace(function=function, **_operations(machine, operation))


# The targets whose types Numba knows.
_registered: set[Target] = set()
_registering = Lock()


def _register_models(models: Any, register_model: Any) -> None:
    @register_model(Vector)
    class VectorModel(models.PrimitiveModel):
        def __init__(self, manager: Any, vector: Vector) -> None:
            super().__init__(manager, vector, ir.VectorType(_STORED[vector.dtype], vector.n))

    @register_model(Words)
    class WordsModel(models.PrimitiveModel):
        def __init__(self, manager: Any, words: Words) -> None:
            super().__init__(manager, words, ir.ArrayType(_I64, words.n).as_pointer())


class _Machine:
    """What differs between the targets."""

    def __init__(self, target: Target, compute_capability: tuple[int, int]) -> None:
        self.is_gpu = target == "cuda"
        self.names_type = compute_capability >= (10, 0)
        # One instruction rounds two numbers to bfloat16.
        self.packs_bfloat16 = self.is_gpu and compute_capability >= (8, 0)

    def pointer(self, builder: Any, address: Any, llvm_type: Any) -> Any:
        return builder.inttoptr(address, llvm_type.as_pointer(1 if self.is_gpu else 0))

    def word(self, builder: Any, words: Any, i: Any) -> Any:
        if not self.is_gpu:
            address = builder.add(words, builder.shl(i, _I64(3)))
            return builder.load(self.pointer(builder, address, _I64))
        for argument in builder.function.args:
            if argument.type == words.type:
                argument.attributes = _ByValue(self.names_type)
        return builder.load(builder.gep(words, [_I32(0), i], inbounds=True))

    def rounded_once(self, builder: Any, name: str, x: Any, y: Any) -> Any:
        """Add, subtract or multiply so that nothing contracts it with another operation."""
        if not self.is_gpu:
            return {"add": builder.fadd, "sub": builder.fsub, "mul": builder.fmul}[name](x, y)
        if name == "sub":
            name, y = "add", builder.fsub(ir.Constant(y.type, -0.0), y)  # its negative
        suffix = "f" if x.type == _FLOAT else "d"
        function = builder.module.declare_intrinsic(
            f"llvm.nvvm.{name}.rn.{suffix}", fnty=ir.FunctionType(x.type, [x.type, x.type])
        )
        return builder.call(function, [x, y])


def _operations(machine: _Machine, operation: Callable[..., Any]) -> dict[str, Any]:
    """Return the operations of `make`, by their names."""
    int64 = types.int64
    reals = {"float32": types.float32, "float64": types.float64}

    def real(dtype: str) -> Any:
        def emit(builder: Any, word: Any) -> Any:
            bits = word if dtype == "float64" else builder.trunc(word, _I32)
            return builder.bitcast(bits, _STORED[dtype])

        return operation(lambda _, word: reals[dtype](int64), emit)

    def read_real(dtype: str) -> Any:
        def emit(builder: Any, address: Any) -> Any:
            return builder.load(machine.pointer(builder, address, _STORED[dtype]))

        return operation(lambda _, address: reals[dtype](int64), emit)

    def write_real(dtype: str) -> Any:
        def emit(builder: Any, address: Any, x: Any) -> None:
            builder.store(x, machine.pointer(builder, address, x.type))

        return operation(lambda _, address, x: types.void(int64, reals[dtype]), emit)

    def ticket(builder: Any, address: Any, last: Any) -> Any:
        kind = ir.FunctionType(_I32, [_I64, _I32])
        instruction = "atom.global.acq_rel.gpu.inc.u32 $0, [$1], $2;"
        assembly = ir.InlineAsm(kind, instruction, "=r,l,r,~{memory}", side_effect=True)
        return builder.call(assembly, [address, builder.trunc(last, _I32)])

    def memory(dtype: str, lanes: int, parts: int = 1, stride: int = 0) -> tuple[Any, Any]:
        vector, lane = Vector(computed(dtype), lanes * parts), _STORED[computed(dtype)]

        def addresses(builder: Any, array: Any, i: Any) -> list[Any]:
            first = builder.add(array, builder.mul(i, _I64(SIZES[dtype])))
            return [builder.add(first, _I64(k * stride * SIZES[dtype])) for k in range(parts)]

        def load(builder: Any, array: Any, i: Any) -> Any:
            numbers = [
                _widen(builder, x, dtype, lane)
                for address in addresses(builder, array, i)
                for x in _read_numbers(machine, builder, address, dtype, lanes)
            ]
            return _vector(builder, numbers)

        def store(builder: Any, array: Any, i: Any, x: Any) -> None:
            numbers = _lanes(builder, x)
            for k, address in enumerate(addresses(builder, array, i)):
                part = numbers[k * lanes : (k + 1) * lanes]
                _write_numbers(machine, builder, address, dtype, part)

        return (
            operation(lambda _, array, i: vector(int64, int64), load),
            operation(lambda _, array, i, x: types.void(int64, int64, vector), store),
        )

    def arithmetic(name: str) -> Any:
        def emit(builder: Any, x: Any, y: Any) -> Any:
            def rounded_once(x: Any, y: Any) -> Any:
                return machine.rounded_once(builder, name, x, y)

            return _by_lane(builder, rounded_once, x, y)

        return operation(lambda _, x, y: (x if isinstance(x, Vector) else y)(x, y), emit)

    def convert(dtype: str) -> Any:
        def emit(builder: Any, x: Any) -> Any:
            return _by_lane(builder, lambda x: _cast(builder, x, _STORED[dtype]), x)

        return operation(lambda _, x: Vector(dtype, x.n)(x), emit)

    def rounded(dtype: str) -> Any:
        def emit(builder: Any, x: Any) -> Any:
            numbers = [_narrow(machine, builder, lane, dtype) for lane in _lanes(builder, x)]
            return _vector(builder, [_widen(builder, n, dtype, x.type.element) for n in numbers])

        return operation(lambda _, x: x(x), emit)

    return {
        "word": operation(lambda _, words, i: int64(words, int64), machine.word),
        "real": {dtype: real(dtype) for dtype in reals},
        "memory": memory,
        "add": arithmetic("add"),
        "sub": arithmetic("sub"),
        "mul": arithmetic("mul"),
        "fma": operation(
            lambda _, x, y, z: z(x, y, z),
            lambda builder, *args: _by_lane(builder, builder.fma, *args),
        ),
        "select": operation(
            lambda _, condition, x, y: x(types.boolean, x, x),
            lambda builder, *args: builder.select(*args),
        ),
        "convert": convert,
        "rounded": rounded,
        "read_real": {dtype: read_real(dtype) for dtype in reals},
        "write_real": {dtype: write_real(dtype) for dtype in reals},
        "ticket": operation(lambda _, address, last: types.int32(int64, int64), ticket),
    }


def _by_lane(builder: Any, operate: Callable[..., Any], *args: Any) -> Any:
    """Operate on each lane, with numbers that stand for vectors of them; or on numbers alone."""
    counts = [x.type.count for x in args if isinstance(x.type, ir.VectorType)]
    if not counts:
        return operate(*args)
    lanes = [
        _lanes(builder, x) if isinstance(x.type, ir.VectorType) else [x] * counts[0] for x in args
    ]
    return _vector(builder, [operate(*of_one) for of_one in zip(*lanes, strict=True)])


def _vector(builder: Any, lanes: Sequence[Any]) -> Any:
    result = ir.Constant(ir.VectorType(lanes[0].type, len(lanes)), ir.Undefined)
    for k, x in enumerate(lanes):
        result = builder.insert_element(result, x, _I32(k))
    return result


def _lanes(builder: Any, vector: Any) -> list[Any]:
    return [builder.extract_element(vector, _I32(k)) for k in range(vector.type.count)]


def _cast(builder: Any, x: Any, to: Any) -> Any:
    """Convert a number to another float type, rounded once."""
    sizes = {ir.HalfType(): 2, _FLOAT: 4, _DOUBLE: 8}
    if x.type == to:
        return x
    return (builder.fpext if sizes[x.type] < sizes[to] else builder.fptrunc)(x, to)


def _access(dtype: str) -> Any:
    """Return the type of an access. Integers of 16 bits go in pairs: NVVM splits longer vectors."""
    if _STORED[dtype] == _I16:
        return ir.VectorType(_I32, ACCESS // 4)
    return ir.VectorType(_STORED[dtype], ACCESS // SIZES[dtype])


def _read_numbers(machine: _Machine, builder: Any, address: Any, dtype: str, n: int) -> list[Any]:
    """Load one number as it is in memory, or so many as fill whole accesses."""
    kind, access = _STORED[dtype], _access(dtype)
    if n == 1:
        return [builder.load(machine.pointer(builder, address, kind))]
    numbers = []
    for offset in range(0, n * SIZES[dtype], ACCESS):
        at = machine.pointer(builder, builder.add(address, _I64(offset)), access)
        for x in _lanes(builder, builder.load(at, align=ACCESS)):
            if kind == _I16:
                numbers += [builder.trunc(x, _I16), builder.trunc(builder.lshr(x, _I32(16)), _I16)]
            else:
                numbers.append(x)
    return numbers


def _write_numbers(
    machine: _Machine, builder: Any, address: Any, dtype: str, lanes: Sequence[Any]
) -> None:
    """Round numbers and store them: one, or so many as fill whole accesses."""
    kind, access = _STORED[dtype], _access(dtype)
    if len(lanes) == 1:
        number = _narrow(machine, builder, lanes[0], dtype)
        builder.store(number, machine.pointer(builder, address, kind))
        return
    if kind == _I16:
        pairs = zip(lanes[::2], lanes[1::2], strict=True)
        units = [_narrow_pair(machine, builder, low, high, dtype) for low, high in pairs]
    else:
        units = [_narrow(machine, builder, x, dtype) for x in lanes]
    for i in range(0, len(units), access.count):
        at = builder.add(address, _I64(i // access.count * ACCESS))
        vector = _vector(builder, units[i : i + access.count])
        builder.store(vector, machine.pointer(builder, at, access), align=ACCESS)


def _widen(builder: Any, x: Any, dtype: str, lane: Any) -> Any:
    """Convert a number from what it is in memory."""
    if dtype == "bfloat16":
        x = builder.bitcast(builder.shl(builder.zext(x, _I32), _I32(16)), _FLOAT)
    return _cast(builder, x, lane)


def _narrow(machine: _Machine, builder: Any, x: Any, dtype: str) -> Any:
    """Round a number to what it is in memory."""
    if dtype != "bfloat16":
        return _cast(builder, x, _STORED[dtype])
    if machine.packs_bfloat16:
        kind = ir.FunctionType(_I16, [_FLOAT])
        return builder.call(ir.InlineAsm(kind, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [x])
    bits = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    up = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
    rounded = builder.trunc(builder.lshr(up, _I32(16)), _I16)
    return builder.select(builder.fcmp_unordered("uno", x, x), _I16(0x7FFF), rounded)


def _narrow_pair(machine: _Machine, builder: Any, low: Any, high: Any, dtype: str) -> Any:
    """Round two numbers to 16 bits each, in one word."""
    if dtype == "bfloat16" and machine.packs_bfloat16:
        kind = ir.FunctionType(_I32, [_FLOAT, _FLOAT])
        pack = ir.InlineAsm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
        return builder.call(pack, [high, low])
    low, high = (_narrow(machine, builder, x, dtype) for x in (low, high))
    return builder.or_(builder.zext(low, _I32), builder.shl(builder.zext(high, _I32), _I32(16)))
