"""`asgd_` beside a model: arrays of all kinds in one arena of memory.

An accepted call changes the arena to what the model says, a refused one changes no byte of it.
What may be refused is found from the bytes of which the elements are made.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import asgd_fast
from reliability.model import reals, same, stepped

DTYPES = ["float16", "float32", "float64", "complex64", "complex128"]
REFUSALS = (TypeError, ValueError, BufferError)
FLAWS = [
    "read-only", "unaligned", "negative stride", "gaps", "repeated", "byte order", "other shape",
    "other dtype", "other axes", "overlap", "other array again",
]  # fmt: skip
WIDER = {"float16": ["float32", "float64"], "float32": ["float64"], "complex64": ["complex128"]}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 6e-8, 6e4, 1e-45, 3e38, 5e-324, 1e308]


@dataclass
class Call:
    """The arrays of one call of `asgd_`, all in one arena, and its scalars."""

    arena: np.ndarray
    params: list = field(default_factory=list)
    grads: list = field(default_factory=list)
    axs: list | None = None
    scalars: dict = field(default_factory=dict)

    @property
    def written(self):
        return self.params + (self.axs or [])


def numbers(random, shape, dtype):
    """Random numbers, special ones among them."""
    x = random.standard_normal((2, *shape))
    special = random.choice(SPECIAL, x.shape)
    x = np.where(random.random(x.shape) < 0.1 * random.integers(2), special, x)
    with np.errstate(all="ignore"):
        return (x[0] + 1j * x[1]).astype(dtype) if "complex" in dtype else x[0].astype(dtype)


def placed(arena, start, shape, dtype, axes, flaw=None):
    """Return an array at an offset of the arena, and where the next one may begin."""
    dtype = np.dtype(dtype)
    if flaw == "unaligned":
        start += 1
    step = dtype.itemsize * (2 if flaw == "gaps" else 1)
    strides = [0] * len(shape)
    for axis in axes:  # the last one varies slowest
        strides[axis] = step
        step *= shape[axis]
    stop = start + max(step, dtype.itemsize)
    assume(stop <= arena.nbytes)
    if flaw == "repeated":
        strides[axes[-1]] = 0
    if flaw == "byte order":
        dtype = dtype.newbyteorder()
    array = np.ndarray(shape, dtype, arena.data, start, strides)
    if flaw == "negative stride":
        array = np.flip(array, axes[-1])
    return array, stop


@st.composite
def calls(draw):
    """A call, in which usually little is wrong."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    arena = random.integers(0, 256, 1 << 14, dtype=np.uint8)
    arena = arena[-arena.ctypes.data % 64 :]
    call = Call(arena)
    n = draw(st.integers(1, 3))
    roles = ["params", "grads"] + ["axs"] * draw(st.booleans())
    flaws = draw(st.lists(st.sampled_from(FLAWS), max_size=draw(st.sampled_from([0, 0, 1, 2]))))
    flawed = {(draw(st.integers(0, n - 1)), draw(st.sampled_from(roles))): x for x in flaws}
    place = 0
    if "axs" in roles:
        call.axs = []
    for i in range(n):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        long = draw(st.integers(0, 40))
        if long and not shape:
            shape = [long * draw(st.integers(1, 5))]
        axes = draw(st.permutations(range(len(shape))))
        param_dtype = draw(st.sampled_from(DTYPES))
        for role in roles:
            flaw = flawed.get((i, role))
            dtype, own_shape, own_axes = param_dtype, list(shape), axes
            if flaw in ("negative stride", "repeated", "gaps", "other axes") and not shape:
                flaw = None
            if role == "axs" and param_dtype in WIDER and draw(st.booleans()):
                dtype = draw(st.sampled_from(WIDER[param_dtype]))
            if flaw == "other dtype":
                dtype = draw(st.sampled_from([*DTYPES, "int32", "bool", "uint64", "longdouble"]))
            if flaw == "other shape":
                own_shape = draw(st.lists(st.integers(0, 7), max_size=3))
                own_axes = list(range(len(own_shape)))
            if flaw == "other axes":
                own_axes = draw(st.permutations(axes))
            place += -place % 64 + 64 * draw(st.integers(0, 1))
            if draw(st.booleans()):
                place += np.dtype(param_dtype).itemsize  # aligned to no more than it need be
            start = place
            if flaw == "overlap":
                start = max(0, place - 8 * draw(st.integers(0, 60)))
            if flaw == "other array again" and call.params:
                others = call.params + call.grads + (call.axs or [])
                array = others[draw(st.integers(0, len(others) - 1))]
            else:
                array, stop = placed(arena, start, own_shape, dtype, own_axes, flaw)
                place = max(place, stop)
                if flaw != "overlap" and array.dtype.kind in "fc":
                    array[...] = numbers(random, array.shape, array.dtype.newbyteorder("=").name)
                array.flags.writeable = flaw != "read-only"
            getattr(call, role).append(array)
    call.scalars = {
        "eta": draw(st.sampled_from([0.0, 0.1, 1e-40, 3.0, 1e30])),
        "mu": draw(st.sampled_from([1.0, 0.5, 1 / 3, 1e-9, 0.0])),
        "lambd": draw(st.sampled_from([0.0, 1e-4, 0.7])),
        "weight_decay": draw(st.sampled_from([0.0, 1e-2, 1e-300, 2.0])),
        "maximize": draw(st.booleans()),
        "grad_scale": draw(st.sampled_from([None, 1.0, 1 / 3, 0.0])),
    }
    if draw(st.integers(0, 19)) == 0:
        name = draw(st.sampled_from(["eta", "mu", "lambd", "weight_decay", "grad_scale"]))
        call.scalars[name] = draw(st.sampled_from([-1.0, math.nan, math.inf, "1", 2 + 1j, [], 1j]))
    return call


def bytes_of(array):
    """The offsets of the bytes of an array's elements, as a sorted array, repetitions kept."""
    places = np.zeros(array.shape, dtype=np.int64) + array.ctypes.data
    for axis, (n, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        places += (stride * np.arange(n)).reshape([-1] + [1] * (array.ndim - axis - 1))
    return np.sort((places.reshape(-1, 1) + np.arange(array.itemsize)).ravel())


def is_sound(array):
    """Whether an array is dense, aligned, and of a dtype that is taken."""
    native = array.dtype.isnative and array.dtype.name in DTYPES
    places = bytes_of(array)
    steps = [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    return (
        native
        and array.ctypes.data % (array.itemsize // (2 if array.dtype.kind == "c" else 1)) == 0
        and (np.diff(places) == 1).all()
        and all(step > 0 for step in steps)
    )


def same_order(one, other):
    return all(
        a == b
        for a, b, n in zip(
            (stride // one.itemsize for stride in one.strides),
            (stride // other.itemsize for stride in other.strides),
            one.shape,
            strict=True,
        )
        if n > 1
    )


def verdict(call):
    """Whether the call must be accepted (True), must be refused (False), or may be either."""
    numbers_ = {name: x for name, x in call.scalars.items() if name != "maximize"}
    for name, x in numbers_.items():
        if x is None and name == "grad_scale":
            continue
        if type(x) is not float or not 0 <= x <= (1 if name == "mu" else 1.7e308):
            return False
    doubtful = False
    spans = []
    for i, param in enumerate(call.params):
        for role, arrays in (("param", call.params), ("grad", call.grads), ("ax", call.axs)):
            if arrays is None:
                continue
            array = arrays[i]
            wide = [param.dtype.name, *(WIDER.get(param.dtype.name, []) if role == "ax" else [])]
            if array.shape != param.shape or array.dtype.name not in wide:
                return False
            if array.size == 0:
                # An empty one has no memory to be wrong, but its library may refuse to lend it.
                doubtful |= not (array.flags.c_contiguous and array.flags.writeable)
                doubtful |= not array.dtype.isnative or not array.flags.aligned
                continue
            if role != "grad" and not array.flags.writeable:
                return False
            if is_sound(array) and same_order(array, param):
                spans.append((role, bytes_of(array)))
            elif role == "grad":
                # It is only read, and a copy does; but NumPy may refuse to lend it.
                doubtful |= not array.dtype.isnative or not array.flags.aligned
                spans.append(("copied", bytes_of(array)))
            else:
                return False
    for i, (role, span) in enumerate(spans):
        for other_role, other in spans[:i]:
            roles = {role, other_role}
            if not roles <= {"grad", "copied"} and np.intersect1d(span, other).size:
                if "copied" not in roles:
                    return False
                doubtful = True  # it may have been copied before anything is written
    return None if doubtful else True


def in_copy(array, arena, copied):
    """The same array in a copy of the arena."""
    start = array.ctypes.data - arena.ctypes.data
    # With negative strides the first element is not at the lowest address.
    low = min(0, sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if s < 0))
    assert start + low >= 0
    return np.ndarray(array.shape, array.dtype, copied.data, start, array.strides)


@contextmanager
def nothing_else_is_lent(call):
    """Let AddressSanitizer, if it watches, report who reads in the arena beside the arrays."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "__asan_poison_memory_region"):
        yield
        return
    poison, unpoison = (process[f"__asan_{x}_memory_region"] for x in ("poison", "unpoison"))
    poison.argtypes = unpoison.argtypes = [ctypes.c_size_t] * 2
    poison(call.arena.ctypes.data, call.arena.nbytes)
    for array in call.params + call.grads + (call.axs or []):
        if array.size:
            first, *_, last = bytes_of(array).tolist()
            unpoison(first, last + 1 - first)
    try:
        yield
    finally:
        unpoison(call.arena.ctypes.data, call.arena.nbytes)


def check_call(call):
    """Make the call, and compare the whole arena with the model's."""
    before = call.arena.copy()
    must = verdict(call)
    try:
        with nothing_else_is_lent(call):
            asgd_fast.asgd_(call.params, call.grads, call.axs, **call.scalars)
    except REFUSALS as error:
        assert must is not True, f"refused: {error}"
        assert call.arena.tobytes() == before.tobytes(), f"a refused call changed memory: {error}"
        return False
    assert must is not False, "accepted what must be refused"
    expected = before.copy()
    for i, param in enumerate(call.params):
        roles = [call.params, call.grads] + [call.axs] * (call.axs is not None)
        p, g, *ax = (reals(in_copy(x[i], call.arena, before)) for x in roles)
        shape = param.shape
        p, ax = stepped(p, g, ax[0] if ax else None, **call.scalars)
        in_copy(param, call.arena, expected)[...] = p.view(param.dtype).reshape(shape)
        if ax is not None:
            average = in_copy(call.axs[i], call.arena, expected)
            average[...] = ax.view(average.dtype).reshape(shape)
    for array in call.written:
        ours = reals(array)
        theirs = reals(in_copy(array, call.arena, expected))
        assert same(ours, theirs), f"{ours} instead of {theirs}"
        in_copy(array, call.arena, expected)[...] = array  # nan payloads
    assert call.arena.tobytes() == expected.tobytes(), "memory beside the arrays was written"
    return True


@contextmanager
def several_threads(n):
    """Let large steps use so many, however many processors there are."""
    before = asgd_fast.get_num_threads()
    asgd_fast.set_num_threads(n)
    try:
        yield
    finally:
        asgd_fast.set_num_threads(before)


def check_large(seed_):
    """A step that several threads share has the bits of the small ones that it repeats."""
    random = np.random.default_rng(seed_)
    dtype = DTYPES[seed_ % 3]
    period = int(random.integers(3, 60))
    n = int(random.integers(2, 9)) * (1 << 20) // np.dtype(dtype).itemsize + seed_ % 7
    small = [numbers(random, (period,), dtype) for _ in range(3)]
    large = [np.resize(x, n) for x in small]
    scalars = {"eta": 0.1, "mu": 0.25, "lambd": 0.01, "weight_decay": 0.1}
    with several_threads(2 + seed_ % 3):
        asgd_fast.asgd_(*large, **scalars)
    p, ax = stepped(*small, **scalars)
    assert same(large[0], np.resize(p, n))
    assert same(large[2], np.resize(ax, n))


def run(campaign):
    def check(call):
        campaign.counts["calls of asgd_"] += 1
        campaign.counts["calls of asgd_ accepted"] += check_call(call)

    campaign.explore(20_000, calls(), check)
    for k in range(campaign.times(100)):
        check_large(campaign.seed + k)
        campaign.counts["steps of several threads"] += 1


@contextmanager
def _asgd(replacement):
    original = asgd_fast.asgd_
    asgd_fast.asgd_ = lambda *args, **kwargs: replacement(original, *args, **kwargs)
    try:
        yield
    finally:
        asgd_fast.asgd_ = original


def _one_bit(original, params, grads, axs=None, **scalars):
    """In the last place of the last element, where there are more than 8."""
    original(params, grads, axs, **scalars)
    for param in params:
        if param.size > 8 and param.dtype == np.float32:
            last = param[tuple(n - 1 for n in param.shape)]
            param[tuple(n - 1 for n in param.shape)] = np.nextafter(last, np.float32(0))


def _change_before_refusal(original, params, grads, axs=None, **scalars):
    """As an engine that checks one row after another."""
    if len(params) > 1:
        original(params[:1], grads[:1], axs and axs[:1], **scalars)
        original(params[1:], grads[1:], axs and axs[1:], **scalars)
    else:
        original(params, grads, axs, **scalars)


def _beside(original, params, grads, axs=None, **scalars):
    """One byte after an array."""
    original(params, grads, axs, **scalars)
    array = params[0]
    if array.dtype == np.float64 and array.flags.c_contiguous and 3 < array.size < 30:
        np.lib.stride_tricks.as_strided(array.reshape(-1)[-1:], (2,), (8,))[1] = 0


CONTROLS = {
    "a wrong last bit": lambda: _asgd(_one_bit),
    "a refused call that changes its first param": lambda: _asgd(_change_before_refusal),
    "a write beside an array": lambda: _asgd(_beside),
}
