"""What Numba does not have: memory by its address, vectors, operations that round where they stand.

All code that emits LLVM stands here. Each operation is made for the GPU or for the CPU, since the
kernels' body is compiled for both: so a machine without a GPU can check its bits. This module does
not know what is computed.

A vector is a value of some lanes of float32 or float64, whatever the numbers are in memory. Lanes
are operated on one by one: LLVM has no vectors of operations that nothing may contract.
"""

from __future__ import annotations

from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llvmlite import ir
from llvmlite.ir.values import ArgumentAttributes
from numba import types

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["SIZES", "Words", "make"]

Target: TypeAlias = Literal["cuda", "cpu"]

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()

# The size of a number in memory, in bytes.
SIZES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "bits16": 2,
    "bits32": 4,
    "bits64": 8,
}

# As LLVM loads and stores it. NVVM knows no bfloat16, which goes as integers.
_STORED = {
    "float16": ir.HalfType(),
    "bfloat16": _I16,
    "float32": _FLOAT,
    "float64": _DOUBLE,
    "bits16": _I16,
    "bits32": _I32,
    "bits64": _I64,
}

# The largest access of one thread, in bytes.
ACCESS = 16


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
        address), ``read(address)``; ``real[dtype](word)`` has the bits of the word, or of its lower
        half.

        Memory, of a dtype in memory and one of the lanes: ``load(stored, dtype, lanes, parts)``
        makes a function of (address, stride), ``store`` one of (address, stride, vector). Each part
        is of `lanes` numbers that follow each other, which are aligned to 16 bytes if there are
        more than one; parts are `stride` bytes apart.

        Arithmetic on vectors, on a vector and numbers, or on two numbers of one type: ``add``,
        ``sub``, ``mul``, each rounded once; ``fma`` with a vector last; ``select(condition, x,
        y)``; ``convert(dtype)`` and ``rounded(stored)`` make functions of a vector.

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
    _register(models, register_model)
    machine = _Machine(target, compute_capability)
    floats = {"float32": types.float32, "float64": types.float64}
    return SimpleNamespace(
        function=function,
        word=_word(machine, intrinsic),
        read=_read(machine, intrinsic, types.int64, _I64),
        real={dtype: _real(intrinsic, floats[dtype]) for dtype in floats},
        load=lambda *form: _load(machine, intrinsic, *form),
        store=lambda *form: _store(machine, intrinsic, *form),
        add=_arithmetic(machine, intrinsic, "add"),
        sub=_arithmetic(machine, intrinsic, "sub"),
        mul=_arithmetic(machine, intrinsic, "mul"),
        fma=_fma(intrinsic),
        select=_select(intrinsic),
        convert=lambda dtype: _convert(intrinsic, dtype),
        rounded=lambda stored: _rounded(machine, intrinsic, stored),
        read_real={
            dtype: _read(machine, intrinsic, floats[dtype], _STORED[dtype]) for dtype in floats
        },
        write_real={dtype: _write_real(machine, intrinsic, floats[dtype]) for dtype in floats},
        ticket=_ticket(intrinsic),
    )


class _Machine:
    """What differs between the targets."""

    def __init__(self, target: Target, compute_capability: tuple[int, int]) -> None:
        self.is_gpu = target == "cuda"
        self.names_type = compute_capability >= (10, 0)
        # One instruction rounds two numbers to bfloat16.
        self.packs_bfloat16 = self.is_gpu and compute_capability >= (8, 0)

    def pointer(self, builder: Any, address: Any, llvm_type: Any) -> Any:
        return builder.inttoptr(address, llvm_type.as_pointer(1 if self.is_gpu else 0))

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


# The data managers that know the types of this module; each target has its own.
_registered: list[Any] = []
_registering = Lock()


def _register(models: Any, register_model: Any) -> None:
    with _registering:
        if models not in _registered:
            _register_models(models, register_model)
            _registered.append(models)


def _register_models(models: Any, register_model: Any) -> None:
    @register_model(Vector)
    class VectorModel(models.PrimitiveModel):
        def __init__(self, manager: Any, vector: Vector) -> None:
            super().__init__(manager, vector, ir.VectorType(_STORED[vector.dtype], vector.n))

    @register_model(Words)
    class WordsModel(models.PrimitiveModel):
        def __init__(self, manager: Any, words: Words) -> None:
            super().__init__(manager, words, ir.ArrayType(_I64, words.n).as_pointer())


def _word(machine: _Machine, intrinsic: Any) -> Any:
    if not machine.is_gpu:

        @intrinsic
        def word_at(typing_context: Any, words: Any, i: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                address = builder.add(args[0], builder.shl(args[1], _I64(3)))
                return builder.load(machine.pointer(builder, address, _I64))

            return types.int64(types.int64, types.int64), codegen

        return word_at

    @intrinsic
    def word(typing_context: Any, words: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            block, place = args
            for argument in builder.function.args:
                if argument.type == block.type:
                    argument.attributes = _ByValue(machine.names_type)
            return builder.load(builder.gep(block, [_I32(0), place], inbounds=True))

        return types.int64(words, types.int64), codegen

    return word


def _read(machine: _Machine, intrinsic: Any, kind: Any, llvm_type: Any) -> Any:
    @intrinsic
    def read(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(machine.pointer(builder, args[0], llvm_type))

        return kind(types.int64), codegen

    return read


def _write_real(machine: _Machine, intrinsic: Any, kind: Any) -> Any:
    @intrinsic
    def write(typing_context: Any, address: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], machine.pointer(builder, args[0], args[1].type))
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return write


def _real(intrinsic: Any, kind: Any) -> Any:
    @intrinsic
    def real(typing_context: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if kind == types.float64:
                return builder.bitcast(args[0], _DOUBLE)
            return builder.bitcast(builder.trunc(args[0], _I32), _FLOAT)

        return kind(types.int64), codegen

    return real


def _ticket(intrinsic: Any) -> Any:
    @intrinsic
    def ticket(typing_context: Any, address: Any, last: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(_I32, [_I64, _I32])
            instruction = "atom.global.acq_rel.gpu.inc.u32 $0, [$1], $2;"
            assembly = ir.InlineAsm(kind, instruction, "=r,l,r,~{memory}", side_effect=True)
            return builder.call(assembly, [args[0], builder.trunc(args[1], _I32)])

        return types.int32(types.int64, types.int64), codegen

    return ticket


def _is_vector(kind: Any) -> bool:
    return isinstance(kind, Vector)


def _by_lane(
    builder: Any, signature: Any, args: Sequence[Any], operation: Callable[..., Any]
) -> Any:
    """Operate on each lane, with numbers that stand for vectors of them."""
    n = signature.return_type.n
    lanes = [
        _lanes(builder, x) if _is_vector(kind) else [x] * n
        for kind, x in zip(signature.args, args, strict=True)
    ]
    return _vector(builder, [operation(*of_one) for of_one in zip(*lanes, strict=True)])


def _arithmetic(machine: _Machine, intrinsic: Any, name: str) -> Any:
    @intrinsic
    def operation(typing_context: Any, x: Any, y: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def of_one(x: Any, y: Any) -> Any:
                return machine.rounded_once(builder, name, x, y)

            if not _is_vector(signature.return_type):
                return of_one(*args)
            return _by_lane(builder, signature, args, of_one)

        return (x if _is_vector(x) else y)(x, y), codegen

    return operation


def _fma(intrinsic: Any) -> Any:
    @intrinsic
    def fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _by_lane(builder, signature, args, builder.fma)

        return z(x, y, z), codegen

    return fma


def _select(intrinsic: Any) -> Any:
    @intrinsic
    def select(typing_context: Any, condition: Any, x: Any, y: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(*args)

        return x(types.boolean, x, x), codegen

    return select


def _convert(intrinsic: Any, dtype: str) -> Any:
    @intrinsic
    def convert(typing_context: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _by_lane(builder, signature, args, lambda x: _cast(builder, x, _STORED[dtype]))

        return Vector(dtype, vector.n)(vector), codegen

    return convert


def _cast(builder: Any, x: Any, to: Any) -> Any:
    """Convert a number to another float type, rounded once."""
    sizes = {ir.HalfType(): 2, _FLOAT: 4, _DOUBLE: 8}
    if x.type == to:
        return x
    return (builder.fpext if sizes[x.type] < sizes[to] else builder.fptrunc)(x, to)


def _vector(builder: Any, lanes: Sequence[Any]) -> Any:
    result = ir.Constant(ir.VectorType(lanes[0].type, len(lanes)), ir.Undefined)
    for k, x in enumerate(lanes):
        result = builder.insert_element(result, x, _I32(k))
    return result


def _lanes(builder: Any, vector: Any) -> list[Any]:
    return [builder.extract_element(vector, _I32(k)) for k in range(vector.type.count)]


def _rounded(machine: _Machine, intrinsic: Any, stored: str) -> Any:
    @intrinsic
    def rounded(typing_context: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lane = _STORED[vector.dtype]
            numbers = [_narrow(machine, builder, x, stored) for x in _lanes(builder, args[0])]
            return _vector(builder, [_widen(builder, x, stored, lane) for x in numbers])

        return vector(vector), codegen

    return rounded


def _load(
    machine: _Machine, intrinsic: Any, stored: str, dtype: str, lanes: int, parts: int
) -> Any:
    @intrinsic
    def load(typing_context: Any, address: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = []
            for part in _parts(builder, args[0], args[1], parts):
                numbers += _read_numbers(machine, builder, part, stored, lanes)
            lane = _STORED[dtype]
            return _vector(builder, [_widen(builder, x, stored, lane) for x in numbers])

        return Vector(dtype, lanes * parts)(types.int64, types.int64), codegen

    return load


def _store(
    machine: _Machine, intrinsic: Any, stored: str, dtype: str, lanes: int, parts: int
) -> Any:
    @intrinsic
    def store(typing_context: Any, address: Any, stride: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address, stride, vector = args
            numbers = _lanes(builder, vector)
            for i, part in enumerate(_parts(builder, address, stride, parts)):
                _write_numbers(machine, builder, part, stored, numbers[i * lanes : (i + 1) * lanes])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, Vector(dtype, lanes * parts)), codegen

    return store


def _parts(builder: Any, address: Any, stride: Any, parts: int) -> list[Any]:
    addresses = [address]
    for _ in range(parts - 1):
        addresses.append(builder.add(addresses[-1], stride))
    return addresses


def _access(kind: Any) -> Any:
    """Return the type of an access. Integers of 16 bits go in pairs: NVVM splits longer vectors."""
    lane = _I32 if kind == _I16 else kind
    size = {_FLOAT: 4, _DOUBLE: 8, ir.HalfType(): 2}.get(lane) or lane.width // 8
    return ir.VectorType(lane, ACCESS // size)


def _read_numbers(machine: _Machine, builder: Any, address: Any, stored: str, n: int) -> list[Any]:
    """Load one number as it is in memory, or so many as fill whole accesses."""
    kind = _STORED[stored]
    if n == 1:
        return [builder.load(machine.pointer(builder, address, kind))]
    numbers = []
    for offset in range(0, n * SIZES[stored], ACCESS):
        at = builder.add(address, _I64(offset))
        for x in _lanes(
            builder, builder.load(machine.pointer(builder, at, _access(kind)), align=ACCESS)
        ):
            if kind == _I16:
                numbers += [builder.trunc(x, _I16), builder.trunc(builder.lshr(x, _I32(16)), _I16)]
            else:
                numbers.append(x)
    return numbers


def _write_numbers(
    machine: _Machine, builder: Any, address: Any, stored: str, lanes: Sequence[Any]
) -> None:
    """Round numbers and store them: one, or so many as fill whole accesses."""
    kind = _STORED[stored]
    if len(lanes) == 1:
        number = _narrow(machine, builder, lanes[0], stored)
        builder.store(number, machine.pointer(builder, address, kind))
        return
    if kind == _I16:
        pairs = zip(lanes[::2], lanes[1::2], strict=True)
        units = [_narrow_pair(machine, builder, low, high, stored) for low, high in pairs]
    else:
        units = [_narrow(machine, builder, x, stored) for x in lanes]
    access = _access(kind)
    for i in range(0, len(units), access.count):
        at = builder.add(address, _I64(i // access.count * ACCESS))
        vector = _vector(builder, units[i : i + access.count])
        builder.store(vector, machine.pointer(builder, at, access), align=ACCESS)


def _widen(builder: Any, x: Any, stored: str, lane: Any) -> Any:
    """Convert a number from what it is in memory."""
    if stored == "bfloat16":
        x = builder.bitcast(builder.shl(builder.zext(x, _I32), _I32(16)), _FLOAT)
    return x if x.type == lane else _cast(builder, x, lane)


def _narrow(machine: _Machine, builder: Any, x: Any, stored: str) -> Any:
    """Round a number to what it is in memory."""
    if stored != "bfloat16":
        return x if x.type == _STORED[stored] else _cast(builder, x, _STORED[stored])
    x = _cast(builder, x, _FLOAT)
    if machine.packs_bfloat16:
        kind = ir.FunctionType(_I16, [_FLOAT])
        return builder.call(ir.InlineAsm(kind, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [x])
    bits = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    up = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
    rounded = builder.trunc(builder.lshr(up, _I32(16)), _I16)
    return builder.select(builder.fcmp_unordered("uno", x, x), _I16(0x7FFF), rounded)


def _narrow_pair(machine: _Machine, builder: Any, low: Any, high: Any, stored: str) -> Any:
    """Round two numbers to 16 bits each, in one word."""
    if stored == "bfloat16" and machine.packs_bfloat16 and low.type == _FLOAT:
        kind = ir.FunctionType(_I32, [_FLOAT, _FLOAT])
        pack = ir.InlineAsm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
        return builder.call(pack, [high, low])
    low, high = (_narrow(machine, builder, x, stored) for x in (low, high))
    return builder.or_(builder.zext(low, _I32), builder.shl(builder.zext(high, _I32), _I32(16)))
