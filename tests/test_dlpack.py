"""How arrays are borrowed and given back, from fake exporters and from real libraries.

The numbers are small enough for every result to be exact, so the oracle is float64 arithmetic.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import chain, product

import exporters
import numpy as np
import pytest
from exporters import assert_given_back, exchange_api, name_of
from numpy.lib.stride_tricks import as_strided

from asgd_fast import asgd_
from asgd_fast._rows.dlpack import path_of

ROLES = ["params", "grads", "axs"]
SCALARS = {"eta": 0.25, "mu": 0.5, "lambd": 0.5, "weight_decay": 0.5}


def each(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=[kind.__name__ for kind in kinds])


def numbers(n=4, dtype=np.float64, first=1):
    return np.arange(first, first + n).astype(dtype)


def stepped(param, grad, ax):
    """Return what a step with SCALARS makes of a param and its average."""
    grad = grad + 0.5 * param
    param = param * (1 - 0.5 * 0.25) - 0.25 * grad
    return param, ax + (param - ax) * 0.5


def rows(kind, n=2, dtype=np.float64):
    """Return the params, grads and averages of n rows as exporters of a kind."""
    return {
        role: [kind(numbers(dtype=dtype, first=10 * i + 50 * j)) for j in range(n)]
        for i, role in enumerate(ROLES)
    }


def step(arrays):
    asgd_(*(arrays[role] for role in ROLES), **SCALARS)


def minus(param, grad):
    asgd_(param, grad, eta=1.0, lambd=0.0)


def assert_refused(arrays, error, message):
    """Assert that a step fails, changes nothing, and gives back all that was lent."""
    everything = list(chain.from_iterable(arrays.values()))
    before = [array.array.tolist() for array in everything]
    with pytest.raises(error, match=f"^{message}") as caught:
        step(arrays)
    assert_given_back(everything)  # while the exception, and so its frames, are still there
    del caught
    assert [array.array.tolist() for array in everything] == before


@each(exporters.KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_updates_the_memory_of_the_exporter_then_gives_it_back(kind, dtype):
    arrays = rows(kind, n=5, dtype=dtype)
    triples = list(zip(*arrays.values(), strict=True))
    expected = [stepped(*(array.array for array in triple)) for triple in triples]
    step(arrays)
    for (param, grad, ax), (new_param, new_ax) in zip(triples, expected, strict=True):
        np.testing.assert_array_equal(param.array, new_param, strict=True)
        np.testing.assert_array_equal(ax.array, new_ax, strict=True)
        assert param.n_deleted == ax.n_deleted == [1]
        np.testing.assert_array_equal(param.loans[0].left_with, new_param)
        np.testing.assert_array_equal(ax.loans[0].left_with, new_ax)
        assert_given_back([param, grad, ax])
    for grad, old in zip(arrays["grads"], rows(kind, n=5)["grads"], strict=True):
        np.testing.assert_array_equal(grad.array, old.array)


@each(exporters.KINDS)
def test_a_missing_deleter_is_tolerated(kind):
    param = kind(numbers(), deleter=False)
    minus(param, kind(numbers(), deleter=False))
    assert param.array.tolist() == [0.0] * 4


FITS = "is not supported; expected float16, bfloat16, float32, float64, complex64 or complex128$"
UNALIGNED = numbers(5).view(np.uint8)[4:-4].view(np.float64)
REPEATED = r"strides \(0,\) of shape \(4,\) leave gaps or repeat elements"
GAPS = r"strides \(2,\) of shape \(4,\) leave gaps or repeat elements; expected a contiguous array"
ADDRESS = "address 0x[0-9a-f]+ is not a multiple of its 8-byte numbers; expected aligned memory$"
DEVICE = (
    "device metal:0 is not supported; expected an array in the memory of the CPU or of a CUDA "
    "device$"
)

# What may be wrong with any array: how it is lent instead, and the message.
FAULTS = {
    "int64": (numbers(dtype=np.int64), {}, f"dtype int64 {FITS}"),
    "uint16": (numbers(dtype=np.uint16), {}, f"dtype uint16 {FITS}"),
    "bool": (np.ones(4, dtype=bool), {}, f"dtype bool {FITS}"),
    "lanes": (numbers(), {"lanes": 2}, f"dtype float64x2 {FITS}"),
    "device": (numbers(), {"device_type": exporters.METAL}, DEVICE),
    "no address": (numbers(), {"data": None}, r"its elements have no memory \(the address is NULL"),
}

# What may be wrong with arrays that are written; grads like these are copied.
UNFIT_LAYOUTS = {
    "strided": (numbers(8)[::2], {}, GAPS),
    "unaligned": (UNALIGNED, {}, ADDRESS),
    "repeated": (as_strided(numbers(1), (4,), (0,)), {}, REPEATED),
}


@each(exporters.KINDS)
@pytest.mark.parametrize(
    ("fault", "role"), [*product(FAULTS, ROLES), *product(UNFIT_LAYOUTS, ["params", "axs"])]
)
def test_an_unfit_array_is_refused(kind, role, fault):
    array, said, message = (FAULTS | UNFIT_LAYOUTS)[fault]
    arrays = rows(kind)
    arrays[role][1] = kind(array, **said)
    assert_refused(arrays, ValueError, rf"{role}\[1\]: {message}")


# What no array can be: how it is lent instead, and the message.
IMPOSSIBLE = {
    "negative ndim": ({"ndim": -1}, "ndim -1 is impossible; expected ndim >= 0$"),
    "no shape": ({"shape": None}, "its shape is NULL; expected the sizes of its 1 axes$"),
    "negative size": ({"shape": (-3,)}, r"shape \(-3,\) is impossible; expected sizes >= 0 of an"),
    "two negative sizes": ({"shape": (-2, -2), "ndim": 2}, r"shape \(-2, -2\) is impossible; "),
    "negative and empty": ({"shape": (0, -2), "ndim": 2}, r"shape \(0, -2\) is impossible; "),
    "too many bytes": ({"shape": (2**61,)}, r"shape \(2305843009213693952,\) is impossible; "),
    "too many elements": ({"shape": (2**32, 2**32), "ndim": 2}, r"shape \(4294967296, 4294967296"),
    "empty, but for that too many": (
        {"shape": (2**62, 2**62, 0), "ndim": 3},
        r"shape \(4611686018427387904, 4611686018427387904, 0\) is impossible; ",
    ),
}


@each(exporters.KINDS)
@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_impossible_description_is_not_believed(kind, what):
    """Of all three arrays alike, so that they match, and of one alone."""
    said, message = IMPOSSIBLE[what]
    arrays = rows(kind)
    for role in reversed(ROLES):
        arrays[role][1] = kind(numbers(), strides=False, **said)
        assert_refused(arrays, ValueError, rf"{role}\[1\]: {message}")


@pytest.mark.parametrize("number", [-2, -1, 1 << 15, (1 << 16) - 1])
def test_a_device_of_an_impossible_number_is_not_taken_for_the_cpu(number):
    arrays = rows(exporters.Exchange)
    for role in ROLES:
        arrays[role][1] = exporters.Exchange(
            numbers(), device_type=exporters.CUDA, device_id=number
        )
    message = rf"params\[1\]: device cuda:{number} is not supported; expected an array in"
    assert_refused(arrays, ValueError, message)


@each(exporters.KINDS)
@pytest.mark.parametrize("role", ROLES[1:])
def test_an_array_unlike_its_param_is_refused(kind, role):
    arrays = rows(kind)
    arrays[role][1] = kind(numbers(3))
    wanted = r"does not match params\[1\] of"
    assert_refused(arrays, ValueError, rf"{role}\[1\]: shape \(3,\) {wanted} shape \(4,\)$")
    arrays[role][1] = kind(numbers(dtype=np.float32))
    wider = " and is no wider one" if role == "axs" else ""
    message = rf"{role}\[1\]: dtype float32 {wanted} dtype float64{wider}$"
    assert_refused(arrays, ValueError, message)


@each(exporters.KINDS)
@pytest.mark.parametrize("role", ROLES[1:])
def test_an_overlap_is_refused(kind, role):
    arrays = rows(kind)
    arrays[role][1] = kind(arrays["params"][0].array)
    message = rf"{role}\[1\]: shares memory with params\[0\]; expected no overlap"
    assert_refused(arrays, ValueError, message)


@each(exporters.VERSIONED_KINDS)
@pytest.mark.parametrize("role", ["params", "axs"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (exporters.READ_ONLY, "it is read-only; expected an array that may be written$"),
        (exporters.IS_COPIED, r"\w+ lent a copy; expected its own memory, to be written$"),
    ],
    ids=["read-only", "copied"],
)
def test_what_may_not_be_written_is_refused(kind, role, flags, message):
    arrays = rows(kind)
    arrays[role][1] = kind(numbers(), flags=flags)
    assert_refused(arrays, BufferError, rf"{role}\[1\]: {message}")


@each(exporters.VERSIONED_KINDS)
@pytest.mark.parametrize(
    "flags", [exporters.READ_ONLY, exporters.IS_COPIED], ids=["read-only", "copied"]
)
def test_a_grad_may_have_any_flag(kind, flags):
    param, grad = kind(numbers()), kind(numbers(), flags=flags)
    minus(param, grad)
    assert param.array.tolist() == [0.0] * 4
    assert_given_back([param, grad])


@pytest.mark.parametrize("role", ["params", "axs"])
def test_legacy_capsules_of_a_type_without_in_place_operators_are_only_read(role):
    arrays = rows(exporters.Legacy)
    arrays[role][1] = exporters.Immutable(numbers())
    message = "Immutable arrays never change; expected an array that may be written$"
    assert_refused(arrays, BufferError, rf"{role}\[1\]: {message}")
    param, grad = exporters.Legacy(numbers()), exporters.Immutable(numbers())
    minus(param, grad)
    assert param.array.tolist() == [0.0] * 4
    assert_given_back([param, grad])


@each([exporters.Legacy, exporters.Versioned])
@pytest.mark.parametrize("library", ["mlx.core", "drjit.llvm.ad"])
@pytest.mark.parametrize("role", ["params", "axs"])
def test_arrays_that_are_values_in_their_library_are_only_read(kind, library, role):
    """Their in-place operators bind a name to a new array."""
    base = type("array", (kind,), {"__module__": library, "__iadd__": lambda self, _: self})
    value = type("Value", (base,), {"__module__": "of_a_user"})
    arrays = rows(kind)
    arrays[role][1] = value(numbers())
    message = rf"{role}\[1\]: Value arrays never change; expected an array that may be written$"
    assert_refused(arrays, BufferError, message)
    param, grad = kind(numbers()), value(numbers())
    minus(param, grad)
    assert param.array.tolist() == [0.0] * 4


@each([exporters.Versioned, exporters.ExchangeManagedOnly])
@pytest.mark.parametrize("role", ROLES)
def test_a_tensor_of_another_major_version_is_given_back(kind, role):
    arrays = rows(kind)
    arrays[role][1] = kind(numbers(), version=(2, 7))
    message = rf"{role}\[1\]: {kind.__name__} did not lend .*version is 2\.7, expected 1\.x$"
    assert_refused(arrays, ValueError, message)
    assert arrays[role][1].n_deleted == [1]


@each(exporters.FAILING_KINDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("error", [TypeError, MemoryError, KeyboardInterrupt])
def test_what_was_lent_before_an_exporter_failed_is_given_back(kind, role, error):
    arrays = rows(exporters.Legacy if kind is exporters.Legacy else exporters.Versioned)
    arrays[role][1] = kind(numbers(), error=error)  # an instance would keep the frames
    assert_refused(arrays, ValueError if error is TypeError else error, "")
    assert arrays["params"][0].n_deleted == [1]


@each(exporters.FAILING_KINDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("error", [TypeError, BufferError, RuntimeError, ValueError, OSError])
def test_an_error_of_the_exporter_is_chained_and_the_argument_named(kind, error, role):
    original = error("not today\nand a backtrace")
    arrays = rows(exporters.Versioned)
    arrays[role][0] = kind(numbers(), error=original)
    message = rf"^{role}\[0\]: {kind.__name__} did not lend its memory through DLPack: not today$"
    with pytest.raises(ValueError, match=message) as caught:
        step(arrays)
    assert caught.value.__cause__ is original


def test_an_exchange_api_may_fail_without_a_reason():
    with pytest.raises(ValueError, match=r"^grads: .* failed and gave no reason$") as caught:
        minus(numbers(), exporters.ExchangeFailsSilently(numbers()))
    assert isinstance(caught.value.__cause__, BufferError)


@each([exporters.Legacy, exporters.Versioned])
@pytest.mark.parametrize("name", [b"used_dltensor", b"used_dltensor_versioned", b"tensor"])
def test_a_capsule_of_another_name_is_left_alone(kind, name):
    array = kind(numbers(), name=name)
    with pytest.raises(ValueError, match=r"^params: .*__dlpack__ returned <capsule .* no unused"):
        minus(array, numbers())
    assert [name_of(capsule) for capsule in array.capsules] == [name]
    assert array.n_deleted == [0]
    array.capsules.clear()
    assert array.n_deleted == [0 if name.startswith(b"used_") else 1]


# What is wrong with an array whose capsule nobody else holds, and how its refusal reads.
DYING = {
    "another major version": (exporters.Versioned, {"version": (2, 7)}, r".*expected 1\.x$"),
    "read-only": (exporters.Versioned, {"flags": exporters.READ_ONLY}, "it is read-only; "),
    "copied": (exporters.Versioned, {"flags": exporters.IS_COPIED}, "Forgetful lent a copy; "),
    "a type that never changes": (exporters.Immutable, {}, "Forgetful arrays never change; "),
    "negative ndim": (exporters.Legacy, {"ndim": -1}, "ndim -1 is impossible; "),
    "another dtype": (exporters.Legacy, {"lanes": 2}, "dtype float64x2 is not supported; "),
}


@pytest.mark.parametrize("what", DYING)
def test_a_capsule_that_dies_in_a_refused_call_does_not_hide_the_error(what):
    """Its destructor runs Python code, in which no exception may be pending."""
    kind, said, message = DYING[what]
    arrays = rows(exporters.Versioned)
    arrays["params"][1] = exporters.forgetful(kind)(numbers(), **said)
    errors = BufferError, ValueError
    with pytest.raises(errors, match=rf"^params\[1\]: {message}"):
        step(arrays)
    assert_given_back(chain.from_iterable(arrays.values()))


@each([exporters.Legacy, exporters.Versioned, exporters.ExchangeManagedOnly])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_what_an_array_raises_after_it_was_lent_does_not_keep_it(kind, error):
    class Negatable(exporters.forgetful(kind)):
        def is_neg(self):
            raise error

    arrays = rows(exporters.Versioned)
    arrays["axs"][1] = Negatable(numbers())
    assert_refused(arrays, error, "")


def test_what_is_no_capsule_is_refused():
    class Confused(exporters.Versioned):
        def __dlpack__(self, **options):
            return memoryview(self.array)

    with pytest.raises(ValueError, match=r"^params\[0\]: .*returned <memory at .*no unused"):
        minus([Confused(numbers())], [numbers()])


# What each kind is asked for as a param (written), then as a grad (read), and what is told of it.
PATHS = {
    exporters.Versioned: ((1, 3), (1, 3), "versioned capsule 1.3"),
    exporters.Exchange: ("managed tensor", "plain tensor", "exchange API 1.3"),
    exporters.ExchangeManagedOnly: ("managed tensor", "managed tensor", "exchange API 1.3"),
    exporters.ExchangeChained: ("managed tensor", "plain tensor", "exchange API 1.2"),
    exporters.ExchangeNewerOnly: ((1, 3), (1, 3), "versioned capsule 1.3"),
    exporters.Legacy: ("no version", "no version", "legacy capsule"),
}


@each(PATHS)
def test_the_exchange_api_is_preferred(kind):
    param, grad = kind(numbers()), kind(numbers(), flags=exporters.READ_ONLY)
    minus(param, grad)
    assert (*param.asked, *grad.asked, path_of(grad)) == PATHS[kind]
    assert_given_back([grad])


def test_the_exchange_api_is_looked_up_once_on_the_type():
    lookups = Counter()

    class Watched(type):
        @property
        def __dlpack_c_exchange_api__(cls):
            lookups[cls] += 1
            return exporters.Exchange.__dlpack_c_exchange_api__

    class WatchedExchange(exporters.Versioned, metaclass=Watched):
        __dlpack_c_exchange_api__ = "what its instances see"

    arrays = rows(WatchedExchange)
    step(arrays)
    step(arrays)
    assert lookups == {WatchedExchange: 1}
    assert [array.asked for array in arrays["params"]] == [["managed tensor"] * 2] * 2


@pytest.mark.parametrize(
    ("on_type", "on_instance"),
    [
        (None, exchange_api((1, 3))),
        (exchange_api((1, 3), name=b"dlpack_api"), None),
        ("no capsule", None),
    ],
    ids=["of the instance", "of another name", "no capsule"],
)
def test_what_is_not_the_exchange_api_of_the_type_is_ignored(on_type, on_instance):
    class Odd(exporters.Versioned):
        __dlpack_c_exchange_api__ = on_type

    param = Odd(numbers())
    param.__dlpack_c_exchange_api__ = on_instance
    minus(param, numbers())
    assert param.asked == [(1, 3)]


def test_a_type_that_takes_no_version_is_asked_with_one_once():
    asked = []

    class Old(exporters.Legacy):
        def __dlpack__(self, **options):
            asked.append(options)
            if options:
                raise TypeError("__dlpack__() got an unexpected keyword argument")
            return super().__dlpack__()

    minus([Old(numbers()) for _ in range(3)], [numbers()] * 3)
    assert asked == [{"max_version": (1, 3)}, {}, {}, {}]


@pytest.mark.parametrize(
    ("error", "asked"),
    [(TypeError, [(1, 3), "no version"]), (BufferError, [(1, 3)])],
    ids=["TypeError", "BufferError"],
)
def test_a_type_is_asked_with_a_version_again_after_an_error_of_its_own(error, asked):
    class Moody(exporters.Versioned):
        pass

    failing, param = Moody(numbers(), error=error("not today")), Moody(numbers())
    with pytest.raises(ValueError, match=r"^params: .*not today$"):
        minus(failing, numbers())
    minus(param, numbers())
    assert (failing.asked, param.asked) == (asked, [(1, 3)])


# How 24 numbers are seen, and what else is said of them.
LAYOUTS = {
    "byte offset": (lambda base: base[5:], {"byte_offset": 24}),
    "no strides": (lambda base: base.reshape(2, 3, 4), {"strides": False}),
    "Fortran": (lambda base: base.reshape(6, 4).T, {}),
    "axes in another order": (lambda base: base.reshape(2, 3, 4).transpose(1, 2, 0), {}),
    "axis of one element": (lambda base: base.reshape(6, 1, 4)[:, ::-1], {}),
    "one element, reversed": (lambda base: base[:1][::-1], {}),
    "no axes": (lambda base: base[3:4].reshape(()), {}),
    "no elements": (lambda base: base.reshape(6, 4)[6:, ::2], {}),
    "no elements and no address": (lambda base: base.reshape(6, 4)[6:], {"data": None}),
    "memory pinned for CUDA": (lambda base: base, {"device_type": exporters.CUDA_HOST}),
}


@each(exporters.KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dense_layout_is_taken(kind, layout):
    view, said = LAYOUTS[layout]
    bases = [numbers(24, first=first) for first in (1, 50, -7)]
    expected = [base.copy() for base in bases]
    view(expected[0])[...], view(expected[2])[...] = stepped(*map(view, expected))
    arrays = [kind(view(base), **said) for base in bases]
    asgd_(*arrays, **SCALARS)
    np.testing.assert_array_equal(bases, expected)  # what is outside the view included
    assert_given_back(arrays)


@each([exporters.Legacy, exporters.Versioned, exporters.ExchangeManagedOnly])
def test_an_array_without_strides_does_not_match_another_axis_order(kind):
    param, ax = kind(numbers(6).reshape(2, 3), strides=False), kind(numbers(6).reshape(3, 2).T)
    message = r"^axs: strides \(1, 2\) does not match params of strides \(3, 1\)$"
    with pytest.raises(ValueError, match=message):
        asgd_(param, np.ones((2, 3)), ax, **SCALARS)
    assert_given_back([param, ax])


@each(exporters.KINDS)
def test_arrays_that_only_the_call_knows_live_until_it_is_done(kind):
    class Mortal(kind):
        def __del__(self):
            self.array[:] = np.nan

    param = numbers()
    minus([param], (Mortal(array) for array in [numbers()]))
    assert param.tolist() == [0.0] * 4


NOT_LENT = "did not lend its memory through DLPack: "
REPEATED = r"strides \(0,\) of shape \(4,\) leave gaps or repeat elements"


class Masked(np.ndarray):
    """As in astropy: an array of NumPy with a mask."""

    mask = True


MASK = "has a mask, which this update does not see; pass its data, which shares the memory, or"

# What may be wrong with arrays of real libraries, with the error and its message.
UNFIT = {
    "NumPy, masked": (np.ma.array(np.ones(4), mask=[0, 1, 0, 0]), TypeError, f"MaskedArray {MASK}"),
    "NumPy, masked nowhere": (np.ma.array(np.ones(4)), TypeError, f"MaskedArray {MASK}"),
    "NumPy, masked otherwise": (np.ones(4).view(Masked), TypeError, f"Masked {MASK}"),
    "NumPy, big-endian": (np.ones(4, ">f8"), ValueError, f"ndarray {NOT_LENT}.*byte order"),
    "NumPy, objects": (np.ones(4, object), ValueError, f"ndarray {NOT_LENT}"),
    "NumPy, records": (np.ones(4, [("x", float)]), ValueError, f"ndarray {NOT_LENT}"),
    "NumPy, uint8": (np.ones(4, np.uint8), ValueError, f"dtype uint8 {FITS}"),
    "NumPy, broadcast": (as_strided(np.ones(1), (4,), (0,)), ValueError, REPEATED),
}

with suppress(ModuleNotFoundError):  # on Pythons that are tested without
    import torch

    CONJUGATED = torch.ones(4, dtype=torch.cfloat).conj()
    EMPTIED = torch.ones(4)
    EMPTIED.untyped_storage().resize_(0)
    REQUIRES_GRAD = torch.ones(4, requires_grad=True)
    DETACH = r"it requires grad, .*its detach\(\), "
    UNFIT |= {
        "torch, negated": (torch._neg_view(torch.ones(4)), ValueError, r".* its resolve_neg\(\)$"),
        "torch, conjugated": (CONJUGATED, ValueError, r".* its resolve_conj\(\)$"),
        "torch, sparse": (torch.ones(4).to_sparse(), ValueError, f"Tensor {NOT_LENT}.*storage$"),
        "torch, meta": (torch.ones(4, device="meta"), ValueError, f"Tensor {NOT_LENT}.*meta$"),
        "torch, expanded": (torch.ones(1).expand(4), ValueError, REPEATED),
        "torch, emptied": (EMPTIED, ValueError, "its elements have no memory"),
        "torch, requires grad": (REQUIRES_GRAD, BufferError, DETACH),
    }


@pytest.mark.parametrize(
    ("what", "role"),
    [
        (what, role)
        for what, role in product(UNFIT, ROLES)
        if role != "grads" or UNFIT[what][2] is not REPEATED  # such grads are copied
    ],
)
def test_an_unfit_array_of_a_library_is_refused(what, role):
    array, error, message = UNFIT[what]
    arrays = {name: [np.ones(4, np.float32)] for name in ROLES} | {role: [array]}
    with pytest.raises(error, match=rf"^{role}\[0\]: {message}"):
        step(arrays)
    arrays[role] = array
    with pytest.raises(error, match=rf"^{role}: {message}"):
        step(arrays)


def test_a_read_only_array_of_numpy_is_only_read():
    frozen, free = np.frombuffer(numbers().tobytes()), numbers()
    for role in ("params", "axs"):
        arrays = {name: [np.ones(4)] for name in ROLES} | {role: [frozen]}
        with pytest.raises(BufferError, match=rf"^{role}\[0\]: it is read-only; expected an array"):
            step(arrays)
    minus(free, frozen)
    assert (free.tolist(), frozen.tolist()) == ([0.0] * 4, [1.0, 2.0, 3.0, 4.0])


def test_a_view_of_a_detached_parameter_is_all_that_is_updated():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    minus(parameter.detach()[1, 1:3], np.ones(2, np.float32))
    assert parameter.tolist() == [[1.0] * 4, [1.0, 0.0, 0.0, 1.0], [1.0] * 4]
