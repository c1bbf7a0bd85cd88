"""How arrays are borrowed and given back, from fake exporters and from real libraries.

The numbers are small enough for every result to be exact, so the oracle is float64 arithmetic.
"""

from __future__ import annotations

from collections import Counter

import exporters
import numpy as np
import pytest
import torch
from exporters import Exporter, exchange_api, name_of

from asgd_fast import asgd_
from asgd_fast._dlpack import path_of

VERSIONED_KINDS = [
    exporters.Versioned,
    exporters.Exchange,
    exporters.ExchangeManagedOnly,
    exporters.ExchangeChained,
    exporters.ExchangeNewerOnly,
]
KINDS = [exporters.Legacy, exporters.IgnoresVersion, *VERSIONED_KINDS]
ROLES = ["params", "grads", "axs"]
SCALARS = {"eta": 0.25, "mu": 0.5, "lambd": 0.5, "weight_decay": 0.5}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_versioned_kind = pytest.mark.parametrize(
    "kind", VERSIONED_KINDS, ids=lambda kind: kind.__name__
)


def numbers(shape=4, dtype=np.float64, first=1):
    """first, first + 1, ..., of a shape."""
    size = int(np.prod(shape))
    return np.arange(first, first + size, dtype=dtype).reshape(shape)


def stepped(param, grad, ax):
    """What a step with SCALARS makes of a param and its average."""
    grad = grad + 0.5 * param
    param = param * (1 - 0.5 * 0.25) - 0.25 * grad
    return param, ax + (param - ax) * 0.5


def rows(kind, n=2):
    """The params, grads and averages of n rows, 4 elements each, as exporters of a kind."""
    return {
        role: [kind(numbers(first=10 * i + 100 * j)) for j in range(n)]
        for i, role in enumerate(ROLES, 1)
    }


def step(arrays):
    asgd_(*(arrays[role] for role in ROLES), **SCALARS)


def assert_given_back(*arrays):
    """Assert that every tensor is given back once, and every capsule consumed."""
    for array in arrays:
        assert array.n_deleted == [1] * len(array.loans)
        assert all(name_of(capsule).startswith(b"used_dltensor") for capsule in array.capsules)
        array.capsules.clear()
        assert array.n_deleted == [1] * len(array.loans), "freed by the capsule too"


def everything(arrays):
    return [array for role in ROLES for array in arrays[role]]


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_updates_the_memory_of_the_exporter_then_gives_it_back(kind, dtype):
    param, grad, ax = (kind(numbers(dtype=dtype, first=first)) for first in (1, 20, -7))
    new_param, new_ax = stepped(param.array, grad.array, ax.array)
    asgd_(param, grad, ax, **SCALARS)
    np.testing.assert_array_equal(param.array, new_param)
    np.testing.assert_array_equal(ax.array, new_ax)
    np.testing.assert_array_equal(grad.array, numbers(first=20))
    assert param.n_deleted == ax.n_deleted == [1]
    np.testing.assert_array_equal(param.loans[0].left_with, new_param)
    np.testing.assert_array_equal(ax.loans[0].left_with, new_ax)
    assert_given_back(param, grad, ax)


@every_kind
def test_many_rows_are_each_given_back_once(kind):
    arrays = rows(kind, n=9)
    expected = [
        stepped(*(array.array for array in row)) for row in zip(*arrays.values(), strict=True)
    ]
    step(arrays)
    for param, ax, (new_param, new_ax) in zip(
        arrays["params"], arrays["axs"], expected, strict=True
    ):
        np.testing.assert_array_equal(param.array, new_param)
        np.testing.assert_array_equal(ax.array, new_ax)
    assert_given_back(*everything(arrays))


@every_kind
def test_a_missing_deleter_is_tolerated(kind):
    param, grad = kind(numbers(), deleter=False), kind(numbers(), deleter=False)
    asgd_(param, grad, eta=1.0, lambd=0.0)
    np.testing.assert_array_equal(param.array, np.zeros(4))


# What may be wrong with any array: how it is lent instead, and the message.
FAULTS = {
    "int64": (numbers(dtype=np.int64), {}, r"dtype int64 .* expected float32 or float64$"),
    "float16": (numbers(dtype=np.float16), {}, r"dtype float16 .* expected float32 or float64$"),
    "complex64": (numbers(dtype=np.complex64), {}, r"dtype complex64 .* expected float32 or"),
    "bool": (np.ones(4, dtype=bool), {}, r"dtype bool .* expected float32 or float64$"),
    "lanes": (numbers(), {"lanes": 2}, r"dtype float64x2 .* expected float32 or float64$"),
    "CUDA": (
        numbers(),
        {"device_type": exporters.CUDA},
        r"device cuda:0 .* expected an array in CPU memory$",
    ),
    "strided": (
        numbers(8)[::2],
        {},
        r"strides \(2,\) of shape \(4,\) leave gaps .* expected a contiguous array",
    ),
    "reversed": (numbers()[::-1], {}, r"strides \(-1,\) of shape \(4,\) leave gaps"),
    "broadcast": (
        np.broadcast_to(numbers(1), 4),
        {},
        r"strides \(0,\) of shape \(4,\) leave gaps or repeat elements",
    ),
    "unaligned": (
        numbers(5).view(np.uint8)[4:-4].view(np.float64),
        {},
        r"address 0x[0-9a-f]+ is not a multiple of its 8-byte elements; expected aligned memory$",
    ),
}


@every_kind
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_unfit_array_is_refused_and_everything_given_back(kind, role, fault):
    array, said, message = FAULTS[fault]
    arrays = rows(kind)
    arrays[role][1] = kind(array, **said)
    before = [array.array.copy() for array in everything(arrays)]
    with pytest.raises(ValueError, match=rf"^{role}\[1\]: {message}"):
        step(arrays)
    assert_given_back(*everything(arrays))
    for array, old in zip(everything(arrays), before, strict=True):
        np.testing.assert_array_equal(array.array, old)


@every_kind
@pytest.mark.parametrize("role", ROLES[1:])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        pytest.param(
            numbers(3),
            r"shape \(3,\) does not match params\[1\] of shape \(4,\)$",
            id="shape",
        ),
        pytest.param(
            numbers((4, 1)),
            r"shape \(4, 1\) does not match params\[1\] of shape \(4,\)$",
            id="axes",
        ),
        pytest.param(
            numbers(dtype=np.float32),
            r"dtype float32 does not match params\[1\] of dtype float64$",
            id="dtype",
        ),
    ],
)
def test_a_mismatch_is_refused_and_everything_given_back(kind, role, array, message):
    arrays = rows(kind)
    arrays[role][1] = kind(array)
    with pytest.raises(ValueError, match=rf"^{role}\[1\]: {message}"):
        step(arrays)
    assert_given_back(*everything(arrays))
    np.testing.assert_array_equal(arrays["params"][0].array, numbers(first=10))


@every_kind
def test_an_overlap_is_refused_and_everything_given_back(kind):
    arrays = rows(kind)
    arrays["grads"][1] = kind(arrays["params"][0].array)
    with pytest.raises(ValueError, match=r"^grads\[1\]: shares memory with params\[0\]; expected"):
        step(arrays)
    assert_given_back(*everything(arrays))
    np.testing.assert_array_equal(arrays["params"][0].array, numbers(first=10))


@every_versioned_kind
@pytest.mark.parametrize("role", ["params", "axs"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (exporters.READ_ONLY, r"it is read-only; expected an array that may be written$"),
        (exporters.IS_COPIED, r"\w+ lent a copy; expected its own memory, to be written$"),
        (exporters.READ_ONLY | exporters.IS_COPIED, r"it is read-only; expected"),
    ],
    ids=["read-only", "copied", "both"],
)
def test_what_may_not_be_written_is_refused_and_given_back(kind, role, flags, message):
    arrays = rows(kind)
    arrays[role][1] = kind(numbers(), flags=flags)
    with pytest.raises(BufferError, match=rf"^{role}\[1\]: {message}"):
        step(arrays)
    assert_given_back(*everything(arrays))
    np.testing.assert_array_equal(arrays[role][1].array, numbers())
    np.testing.assert_array_equal(arrays["params"][0].array, numbers(first=10))


@every_versioned_kind
@pytest.mark.parametrize("flags", [exporters.READ_ONLY, exporters.IS_COPIED, 4])
def test_a_grad_may_have_any_flag(kind, flags):
    param, grad = kind(numbers()), kind(numbers(), flags=flags)
    asgd_(param, grad, eta=1.0, lambd=0.0)
    np.testing.assert_array_equal(param.array, np.zeros(4))
    assert_given_back(param, grad)


def test_legacy_capsules_of_a_type_without_in_place_operators_are_only_read():
    param, grad = exporters.Immutable(numbers()), exporters.Legacy(numbers())
    with pytest.raises(BufferError, match=r"^params: Immutable arrays never change; expected"):
        asgd_(param, grad, eta=1.0, lambd=0.0)
    assert_given_back(param, grad)
    asgd_(grad, param, eta=1.0, lambd=0.0)
    np.testing.assert_array_equal(grad.array, np.zeros(4))
    np.testing.assert_array_equal(param.array, numbers())
    assert_given_back(param, grad)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "kind",
    [exporters.Versioned, exporters.ExchangeManagedOnly],
    ids=["capsule", "exchange API"],
)
def test_a_tensor_of_another_major_version_is_given_back_unread(kind, role):
    arrays = rows(kind)
    arrays[role][1] = kind(numbers(), version=(2, 7), flags=exporters.READ_ONLY)
    with pytest.raises(ValueError, match=rf"^{role}\[1\]: .*its version is 2\.7, expected 1\.x$"):
        step(arrays)
    assert arrays[role][1].n_deleted == [1]
    assert_given_back(*everything(arrays))


@every_kind
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("error", [TypeError, BufferError, MemoryError, KeyboardInterrupt])
def test_what_was_lent_before_an_exporter_failed_is_given_back(kind, role, error):
    class Failing(exporters.Versioned):
        def __dlpack__(self, **options):
            raise error

    arrays = rows(kind)
    arrays[role][1] = Failing(numbers())
    passes = error in (MemoryError, KeyboardInterrupt)
    with pytest.raises(error if passes else ValueError):
        step(arrays)
    assert_given_back(*everything(arrays))
    assert arrays["params"][0].loans
    np.testing.assert_array_equal(arrays["params"][0].array, numbers(first=10))


class ExchangeFails(exporters.Versioned):
    __dlpack_c_exchange_api__ = exchange_api((1, 3), fails="with a reason")


class ExchangeFailsSilently(exporters.Versioned):
    __dlpack_c_exchange_api__ = exchange_api((1, 3), fails="without a reason")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("error", [TypeError, BufferError, RuntimeError, ValueError, OSError])
@pytest.mark.parametrize(
    "kind",
    [exporters.Legacy, exporters.Versioned, ExchangeFails],
    ids=lambda kind: kind.__name__,
)
def test_an_error_of_the_exporter_is_chained_and_the_argument_named(kind, error, role):
    original = error("not today\nand a backtrace")
    arrays = rows(exporters.Versioned)
    arrays[role][1] = kind(numbers(), error=original)
    message = rf"^{role}\[1\]: {kind.__name__} did not lend its memory through DLPack: not today$"
    with pytest.raises(ValueError, match=message) as caught:
        step(arrays)
    assert caught.value.__cause__ is original


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "kind",
    [exporters.Legacy, exporters.Versioned, ExchangeFails],
    ids=lambda kind: kind.__name__,
)
def test_an_error_that_is_not_about_the_array_passes_through(kind, error):
    original = error("no more")
    with pytest.raises(error) as caught:
        asgd_([kind(numbers(), error=original)], [numbers()], eta=1.0)
    assert caught.value is original


def test_an_exchange_api_may_fail_without_a_reason():
    with pytest.raises(ValueError, match=r"^grads: .* failed and gave no reason$") as caught:
        asgd_(numbers(), ExchangeFailsSilently(numbers()), eta=1.0)
    assert isinstance(caught.value.__cause__, BufferError)


@pytest.mark.parametrize("kind", [exporters.Legacy, exporters.Versioned])
@pytest.mark.parametrize("name", [b"used_dltensor", b"used_dltensor_versioned", b"tensor"])
def test_a_capsule_of_another_name_is_left_alone(kind, name):
    array = kind(numbers(), name=name)
    with pytest.raises(ValueError, match=r"^params: .*__dlpack__ returned <capsule .* no unused"):
        asgd_(array, numbers(), eta=1.0)
    (capsule,) = array.capsules
    assert name_of(capsule) == name
    assert array.n_deleted == [0]
    del capsule
    array.capsules.clear()
    assert array.n_deleted == [0 if name.startswith(b"used_") else 1]


def test_what_is_no_capsule_is_refused():
    class Confused(exporters.Versioned):
        def __dlpack__(self, **options):
            return memoryview(self.array)

    with pytest.raises(ValueError, match=r"^params\[0\]: .*returned <memory at .*no unused"):
        asgd_([Confused(numbers())], [numbers()], eta=1.0)


# What each kind is asked for as a param (written), then as a grad (read).
ASKED = [
    (exporters.Versioned, ((1, 3), (1, 3))),
    (exporters.Exchange, ("managed tensor", "plain tensor")),
    (exporters.ExchangeManagedOnly, ("managed tensor", "managed tensor")),
    (exporters.ExchangeChained, ("managed tensor", "plain tensor")),
    (exporters.ExchangeNewerOnly, ((1, 3), (1, 3))),
]


@pytest.mark.parametrize(
    ("kind", "asked"), ASKED, ids=[kind.__name__ for kind, _ in ASKED]
)
def test_the_exchange_api_is_preferred(kind, asked):
    param, grad = kind(numbers()), kind(numbers())
    asgd_(param, grad, eta=1.0, lambd=0.0)
    assert (param.asked, grad.asked) == ([asked[0]], [asked[1]])


def test_the_exchange_api_suffices():
    class ExchangeAlone(Exporter):
        __dlpack_c_exchange_api__ = exchange_api((1, 3))

    param = ExchangeAlone(numbers())
    asgd_(param, ExchangeAlone(numbers()), eta=1.0, lambd=0.0)
    np.testing.assert_array_equal(param.array, np.zeros(4))


def test_the_exchange_api_is_looked_up_once_on_the_type():
    lookups = Counter()

    class Watched(type):
        @property
        def __dlpack_c_exchange_api__(cls):
            lookups[cls] += 1
            return exporters.Exchange.__dlpack_c_exchange_api__

    class WatchedExchange(exporters.Versioned, metaclass=Watched):
        __dlpack_c_exchange_api__ = "not that of the type"

    arrays = rows(WatchedExchange)
    step(arrays)
    step(arrays)
    assert lookups == {WatchedExchange: 1}
    assert [array.asked for array in arrays["params"]] == [["managed tensor"] * 2] * 2


@pytest.mark.parametrize(
    "capsule",
    [exchange_api((1, 3)), exchange_api((1, 3), name=b"dlpack_api"), "no capsule", None],
    ids=["on the instance", "of another name", "of another kind", "None"],
)
def test_what_is_not_the_exchange_api_of_the_type_is_ignored(capsule, request):
    class Odd(exporters.Versioned):
        pass

    param = Odd(numbers())
    if "on the instance" in request.node.name:
        param.__dlpack_c_exchange_api__ = capsule
    else:
        Odd.__dlpack_c_exchange_api__ = capsule
    asgd_(param, numbers(), eta=1.0, lambd=0.0)
    assert param.asked == [(1, 3)]
    np.testing.assert_array_equal(param.array, np.zeros(4))


def test_a_type_that_takes_no_version_is_asked_with_one_once():
    asked = []

    class Old(exporters.Legacy):
        def __dlpack__(self, **options):
            asked.append(options)
            if options:
                raise TypeError("__dlpack__() got an unexpected keyword argument")
            return super().__dlpack__()

    asgd_([Old(numbers()) for _ in range(3)], [numbers()] * 3, eta=1.0)
    assert asked == [{"max_version": (1, 3)}, {}, {}, {}]


def test_a_type_is_asked_with_a_version_again_after_an_error_of_its_own():
    class Moody(exporters.Versioned):
        pass

    failing, param = Moody(numbers(), error=TypeError("not today")), Moody(numbers())
    with pytest.raises(ValueError, match=r"^params: .*not today$"):
        asgd_(failing, numbers(), eta=1.0)
    assert failing.asked == [(1, 3), None]
    asgd_(param, numbers(), eta=1.0)
    assert param.asked == [(1, 3)]
