"""`asgd_` and libraries that lie, fail and run Python: fake exporters with planted faults.

Nothing may crash. A refused call changes nothing, an accepted one has the model's bits, and every
tensor that was lent is given back once. What a description says of memory that is there cannot be
checked and is trusted: no lie here is of that kind.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager

import exporters
import numpy as np
from hypothesis import strategies as st

import asgd_fast
from reliability.model import same, stepped

KINDS = {
    kind.__name__: kind for kind in (*exporters.KINDS, exporters.Immutable, exporters.ExchangeFails)
}
VERSIONED = tuple(exporters.VERSIONED_KINDS)
MAY_NOT_BE_WRITTEN = exporters.READ_ONLY | exporters.IS_COPIED
HUGE = 2**62


class Stop(BaseException):
    """What no library is meant to raise."""


ERRORS = [
    BufferError, ValueError, TypeError, MemoryError, RecursionError, OSError, KeyboardInterrupt,
    SystemExit, Stop, StopIteration,
]  # fmt: skip


def _set(**fields):
    def lie(tensor):
        for name, value in fields.items():
            setattr(tensor, name, value)

    return lie


def _sizes(*values):
    return (ctypes.c_int64 * len(values))(*values)


def _set_shape(*shape, strides=True):
    def lie(tensor):
        tensor.ndim = len(shape)
        tensor.shape = sizes = _sizes(*shape)
        tensor.strides = steps = _sizes(*[1] * len(shape)) if strides else None
        return sizes, steps

    return lie


def _set_strides(step):
    def lie(tensor):
        tensor.strides = steps = _sizes(step)
        return steps

    return lie


def _dtype(code, bits, lanes=1):
    return _set(dtype=exporters.DLDataType(code, bits, lanes))


def _device(kind, number=0):
    return _set(device=exporters.DLDevice(kind, number))


# What is said of a tensor that nobody can believe, or that no engine takes: all must be refused.
# Each returns the memory that it points to.
LIES = {
    "no axes, ndim -1": _set(ndim=-1),
    "ndim -2147483648": _set(ndim=-(2**31)),
    "a negative size": _set_shape(-3),
    "two negative sizes": _set_shape(-2, -2),
    "a product of sizes that overflows": _set_shape(2**32, 2**32),
    "a product that overflows to what is there": _set_shape(2**63 - 1, 2**63 - 1),
    "bytes that overflow": _set_shape(2**61, strides=False),
    "more bytes than addresses": _set_shape(HUGE, strides=False),
    "integers": _dtype(0, 64),
    "bool": _dtype(6, 8),
    "no dtype that there is": _dtype(99, 64),
    "float of 24 bits": _dtype(2, 24),
    "float of no bits": _dtype(2, 0),
    "lanes": _dtype(2, 64, 4),
    "no lanes": _dtype(2, 64, 0),
    "float8": _dtype(10, 8),
    "no memory": _set(data=None, byte_offset=0),
    "Metal": _device(8),
    "no device that there is": _device(77),
    "a negative device": _device(-1, -1),
}

# Those of params and averages alone: a grad of another layout is copied first, and where its memory
# is, is trusted.
LAYOUT_LIES = {
    "an unaligned address": lambda tensor: setattr(tensor, "data", tensor.data + 1),
    "strides of 0": _set_strides(0),
    "strides that leave gaps": _set_strides(2),
    "negative strides": _set_strides(-1),
    "huge strides": _set_strides(HUGE),
}


def array_of(kind, numbers, *, lie=None, forgets=False, fails=None, returns=None, **options):
    """An exporter with faults.

    Parameters
    ----------
    kind : type
        Of exporters.
    lie : callable, optional
        Of LIES.
    forgets : bool
        Whether nobody else keeps the capsule, whose destructor runs Python.
    fails : type, optional
        What its deleter raises, once it has done its work.
    returns : object, optional
        What `__dlpack__` returns instead of a capsule.
    """

    class Faulty(kind):
        def fill(self, tensor):
            self.buffers = super().fill(tensor)
            if lie is not None:
                self.lies = *getattr(self, "lies", ()), lie(tensor)
            return self.buffers

        def lend(self, managed):
            loan = super().lend(managed)
            if fails is not None:
                managed.deleter = ctypes.cast(_failing_deleter(fails), ctypes.c_void_p).value
            return loan

        def capsule(self, kind, name):
            if returns is not None:
                return returns
            capsule = super().capsule(kind, name)
            if forgets:
                self.capsules.clear()
            return capsule

    Faulty.__name__ = kind.__name__
    return Faulty(numbers, **options)


_deleters = {}


def _failing_deleter(error):
    if error not in _deleters:

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def delete(address):
            exporters._loans[address].n_deleted += 1
            raise error("of a deleter")

        _deleters[error] = delete
    return _deleters[error]


@st.composite
def faults(draw, lies):
    """Options of `array_of`, and whether they must be refused (False), or may be either (None)."""
    seldom = ["error", "returns", "version", "flags"]
    fault = draw(st.sampled_from([*["none"] * 6, *["lie"] * 4, *seldom]))
    own = {
        "forgets": draw(st.booleans()),
        "fails": draw(st.sampled_from([None, None, None, ValueError, KeyboardInterrupt])),
        "deleter": draw(st.sampled_from([True, True, True, False])),
        "strides": draw(st.booleans()),
    }
    must = True
    if fault == "lie":
        own["lie"] = lies[draw(st.sampled_from(sorted(lies)))]
        must = False
    elif fault == "error":
        own["error"] = draw(st.sampled_from(ERRORS))
        must = None  # an exchange API that never fails does not ask for it
    elif fault == "returns":
        own["returns"] = draw(st.sampled_from([0, "capsule", (), [], object()]))
        must = None
    elif fault == "version":
        own["version"] = draw(st.sampled_from([(0, 8), (2, 0), (2**32 - 1, 0), (1, 99)]))
        own["flags"] = draw(st.sampled_from([0, 1, 2, 3, 4, 2**63]))
        must = None
    elif fault == "flags":
        own["flags"] = draw(st.sampled_from([1, 2, 3, 4, 2**63]))
        must = None  # unless it says what its flags are: see `check_call`
    return own, must


@st.composite
def calls(draw):
    """The arrays of a call: for each a kind, its faults and its role."""
    n = draw(st.integers(1, 3))
    size = draw(st.integers(2, 40))
    roles = ["params", "grads"] + ["axs"] * draw(st.booleans())
    kinds = st.sampled_from(sorted(KINDS))
    arrays = {
        role: [
            (draw(kinds), *draw(faults(LIES if role == "grads" else LIES | LAYOUT_LIES)))
            for _ in range(n)
        ]
        for role in roles
    }
    return size, arrays, draw(st.integers(0, 2**32))


def check_call(case):
    size, plan, seed_ = case
    random = np.random.default_rng(seed_)
    arrays, before, musts, errors = {}, {}, [], []
    for role, each in plan.items():
        arrays[role] = []
        for kind, own, must in each:
            own = dict(own)
            if "error" in own:
                errors.append(own["error"])
                own["error"] = own["error"]("of a library")
            array = array_of(KINDS[kind], random.standard_normal(size), **own)
            if kind == "ExchangeFails" or (kind == "Immutable" and role != "grads"):
                must = False
            if array.flags or array.version != (1, 3):
                # Where it is said whether memory may be written, that must be heard.
                says = issubclass(KINDS[kind], VERSIONED) and role != "grads"
                forbids = array.version[0] != 1 or array.flags & MAY_NOT_BE_WRITTEN
                must = False if says and forbids else None
            musts.append(must)
            arrays[role].append(array)
        before[role] = [array.array.copy() for array in arrays[role]]
    everything = [array for each in arrays.values() for array in each]
    scalars = {"eta": 0.25, "mu": 0.5, "lambd": 0.5, "weight_decay": 0.5}
    try:
        asgd_fast.asgd_(*arrays.values(), **scalars)
        accepted = True
    except (TypeError, ValueError, BufferError, *errors) as error:
        accepted = False
        assert not all(musts), f"refused: {error!r}"
        del error
    except BaseException as error:
        raise AssertionError(f"an error of no kind that is promised: {error!r}") from error
    assert not (accepted and False in musts), "accepted what must be refused"
    for role, each in arrays.items():
        for array, old in zip(each, before[role], strict=True):
            if not accepted or role == "grads":
                assert same(array.array, old), "memory was changed"
    if accepted:
        for i, param in enumerate(arrays["params"]):
            ax = before["axs"][i] if "axs" in arrays else None
            p, ax = stepped(before["params"][i], before["grads"][i], ax, **scalars)
            assert same(param.array, p)
            assert ax is None or same(arrays["axs"][i].array, ax)
    for array in everything:
        array.capsules.clear()
    for array in everything:
        for loan in array.loans:
            expected = int(array.deleter or loan.managed.deleter is not None)
            assert loan.n_deleted == expected, f"given back {loan.n_deleted} times"
    return accepted


_KEPT = len(exporters._pointed_to)  # by the exchange APIs, of which there is one for each kind


def forget_loans():
    """The exporters keep what they lent for good; a campaign has no room for that."""
    exporters._loans.clear()
    del exporters._pointed_to[_KEPT:]


@contextmanager
def quiet():
    """Without the lines in which ctypes says what a deleter raised."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def run(campaign):
    def check(case):
        campaign.counts["calls with faulty libraries"] += 1
        try:
            with quiet():
                campaign.counts["calls with faulty libraries accepted"] += check_call(case)
        finally:
            forget_loans()

    campaign.explore(10_000, calls(), check)


@contextmanager
def _wrapped(wrapper):
    original = asgd_fast.asgd_
    asgd_fast.asgd_ = lambda *arrays, **scalars: wrapper(original, arrays, scalars)
    try:
        yield
    finally:
        asgd_fast.asgd_ = original


def _returns_twice(original, arrays, scalars):
    original(*arrays, **scalars)
    for loan in arrays[0][0].loans:
        exporters._delete(loan.address)


def _swallows(*words):
    def update(original, arrays, scalars):
        try:
            original(*arrays, **scalars)
        except (ValueError, BufferError) as error:
            if not any(word in str(error) for word in words):
                raise

    return update


CONTROLS = {
    "a loan given back twice": lambda: _wrapped(_returns_twice),
    "impossible strides accepted": lambda: _wrapped(_swallows("negative", "strides")),
    "memory that may not be written accepted": lambda: _wrapped(
        _swallows("is read-only", "lent a copy")
    ),
}
