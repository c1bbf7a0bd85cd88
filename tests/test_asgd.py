"""asgd_: what it takes, what it refuses, and that a refused call changes nothing."""

from __future__ import annotations

import sys
import threading
import tracemalloc

import exporters
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_fast import ArrayASGD, asgd_


def f32(*shape):
    return np.ones(shape, np.float32)


class IteratesIntoCopies:
    """As HDF5 and Zarr have arrays: outside of memory, and read into new arrays of NumPy."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __iter__(self):
        return (row.copy() for row in self.array)


def read_only(array):
    array.flags.writeable = False
    return array


def off_by_one_byte(n):
    return np.frombuffer(bytearray(4 * n + 1), np.float32, offset=1)


def parts(array, *bounds):
    return [array[start:stop] for start, stop in bounds]


NOT_ARRAYS = "expected an array or a sequence of arrays, got"

# What is wrong, the call, the error, and what its message says.
REFUSED = {
    "grad of another shape": (
        lambda: ([f32(2), f32(6)], [f32(2), f32(5)], None, {}),
        ValueError,
        r"^grads\[1\]: shape \(5,\) does not match params\[1\] of shape \(6,\)$",
    ),
    "single arrays go by their argument's name": (
        lambda: (f32(6), f32(5), None, {}),
        ValueError,
        r"^grads: shape \(5,\) does not match params of shape \(6,\)$",
    ),
    "grad of another rank": (
        lambda: (f32(4), f32(4, 1), None, {}),
        ValueError,
        r"^grads: shape \(4, 1\) does not match params of shape \(4,\)$",
    ),
    "average of another shape": (
        lambda: ([f32(3)], [f32(3)], [f32(4)], {}),
        ValueError,
        r"^axs\[0\]: shape \(4,\) does not match params\[0\] of shape \(3,\)$",
    ),
    "grad of another dtype": (
        lambda: ([f32(3)], [np.ones(3)], None, {}),
        ValueError,
        r"^grads\[0\]: dtype float64 does not match params\[0\] of dtype float32$",
    ),
    "average of another dtype": (
        lambda: (np.ones(3), np.ones(3), f32(3), {}),
        ValueError,
        "^axs: dtype float32 does not match params of dtype float64 and is no wider one$",
    ),
    "average of half precision": (
        lambda: (torch.ones(3).half(), torch.ones(3).half(), torch.ones(3).bfloat16(), {}),
        ValueError,
        "^axs: dtype bfloat16 does not match params of dtype float16 and is no wider one$",
    ),
    "complex average": (
        lambda: (f32(3), f32(3), np.ones(3, np.complex128), {}),
        ValueError,
        "^axs: dtype complex128 does not match params of dtype float32 and is no wider one$",
    ),
    "real average": (
        lambda: (np.ones(3, np.complex64), np.ones(3, np.complex64), np.ones(3), {}),
        ValueError,
        "^axs: dtype float64 does not match params of dtype complex64 and is no wider one$",
    ),
    "integers": (
        lambda: (np.ones(3, np.int64), np.ones(3, np.int64), None, {}),
        ValueError,
        "^params: dtype int64 is not supported; expected float16, bfloat16, .* or complex128$",
    ),
    "long doubles": (
        lambda: (np.ones(3, np.longdouble), np.ones(3, np.longdouble), None, {}),
        ValueError,
        "^params: ndarray did not lend its memory through DLPack: .*longdouble",
    ),
    "booleans": (
        lambda: (f32(3), np.ones(3, np.bool_), None, {}),
        ValueError,
        "^grads: dtype bool is not supported",
    ),
    "the other half type": (
        lambda: (torch.ones(3, dtype=torch.bfloat16), torch.ones(3).half(), None, {}),
        ValueError,
        "^grads: dtype float16 does not match params of dtype bfloat16$",
    ),
    "eight bits": (
        lambda: (torch.ones(3).to(torch.float8_e5m2), torch.ones(3), None, {}),
        ValueError,
        "^params: ",
    ),
    "another byte order": (
        lambda: (np.ones(3, ">f4"), f32(3), None, {}),
        ValueError,
        "^params: ndarray did not lend its memory through DLPack: .*byte order",
    ),
    "another device": (
        lambda: (torch.ones(3, device="meta"), f32(3), None, {}),
        ValueError,
        "^params: Tensor did not lend its memory through DLPack: .*meta$",
    ),
    "strided param": (
        lambda: (f32(6)[::2], f32(3), None, {}),
        ValueError,
        r"^params: strides \(2,\) of shape \(3,\) leave gaps .* np.ascontiguousarray makes$",
    ),
    "reversed average": (
        lambda: (f32(3), f32(3), f32(3)[::-1], {}),
        ValueError,
        r"^axs: strides \(-1,\) of shape \(3,\)",
    ),
    "column": (
        lambda: (f32(3, 4)[:, 1], f32(3), None, {}),
        ValueError,
        r"^params: strides \(4,\) of shape \(3,\)",
    ),
    "strided grad of another shape": (
        lambda: (f32(3), f32(8)[::2], None, {}),
        ValueError,
        r"^grads: strides \(2,\) of shape \(4,\)",
    ),
    "transposed grad of another dtype": (
        lambda: (f32(3, 3), np.ones((3, 3)).T, None, {}),
        ValueError,
        "^grads: dtype float64 does not match params of dtype float32$",
    ),
    "average in another axis order": (
        lambda: (np.asfortranarray(f32(3, 4)), np.asfortranarray(f32(3, 4)), f32(3, 4), {}),
        ValueError,
        r"^axs: strides \(4, 1\) does not match params of strides \(1, 3\)$",
    ),
    "misaligned param": (
        lambda: (off_by_one_byte(3), f32(3), None, {}),
        ValueError,
        "^params: address 0x[0-9a-f]+ is not a multiple of its 4-byte numbers",
    ),
    "read-only param": (
        lambda: ([f32(3), read_only(f32(3))], [f32(3), f32(3)], None, {}),
        BufferError,
        r"^params\[1\]: it is read-only; expected an array that may be written$",
    ),
    "read-only average": (
        lambda: (f32(3), f32(3), read_only(f32(3)), {}),
        BufferError,
        "^axs: it is read-only",
    ),
    "tensor that requires grad": (
        lambda: ([torch.ones(3, requires_grad=True)], [torch.ones(3)], None, {}),
        BufferError,
        r"^params\[0\]: it requires grad, and autograd does not see this update; pass its detach",
    ),
    "param listed twice": (
        lambda: ([p := f32(3), f32(2), p], [f32(3), f32(2), f32(3)], None, {}),
        ValueError,
        r"^params\[2\]: is params\[0\] again; expected each param once$",
    ),
    "params that overlap": (
        lambda: (parts(f32(9), (0, 5), (4, 9)), [f32(5), f32(5)], None, {}),
        ValueError,
        r"^params\[1\]: shares memory with params\[0\]; expected no overlap",
    ),
    "param inside a larger one": (
        lambda: (parts(f32(9), (0, 9), (4, 5), (6, 8)), [f32(9), f32(1), f32(2)], None, {}),
        ValueError,
        r"^params\[[12]\]: shares memory with params\[0\]",
    ),
    "grad that is its param": (
        lambda: (p := f32(3), p, None, {}),
        ValueError,
        "^grads: shares memory with params; expected no overlap",
    ),
    "grad that overlaps another param": (
        lambda: ([f32(3), (b := f32(6))[3:]], [b[1:4], f32(3)], None, {}),
        ValueError,
        r"^params\[1\]: shares memory with grads\[0\]",
    ),
    "param inside a grad that another grad is inside too": (
        lambda: (
            [f32(9), f32(1), (b := f32(9))[6:8]],
            [b, b[4:5], f32(2)],
            None,
            {},
        ),
        ValueError,
        r"^params\[2\]: shares memory with grads\[0\]",
    ),
    "average that is its param": (
        lambda: (p := f32(3), f32(3), p, {}),
        ValueError,
        "^axs: shares memory with params",
    ),
    "average that overlaps a grad": (
        lambda: (f32(3), (b := f32(4))[:3], b[1:], {}),
        ValueError,
        "^axs: shares memory with grads",
    ),
    "two averages that overlap": (
        lambda: ([f32(2), f32(2)], [f32(2), f32(2)], parts(f32(3), (0, 2), (1, 3)), {}),
        ValueError,
        r"^axs\[1\]: shares memory with axs\[0\]",
    ),
    "too few grads": (
        lambda: ([f32(3), f32(3)], [f32(3)], None, {}),
        ValueError,
        "^grads: got 1 arrays for 2 params; expected one for each$",
    ),
    "numbers for one array": (
        lambda: (f32(3), [1.0, 2.0, 3.0], None, {}),
        TypeError,
        "^grads: got 3 elements of type float for 1 params; expected one array .* np.asarray makes",
    ),
    "lists for one array": (
        lambda: (f32(3, 1), [[1.0], [2.0], [3.0]], None, {}),
        TypeError,
        "^grads: got 3 elements of type list for 1 params",
    ),
    "a scalar of another dtype": (
        lambda: (np.ones(()), np.float32(1), None, {}),
        ValueError,
        r"^grads\[0\]: dtype float32 does not match params of dtype float64$",
    ),
    "a scalar for a param": (
        lambda: (np.float64(1), np.float64(1), None, {}),
        TypeError,
        r"^params\[0\]: float64 is not an array",
    ),
    "an array that iterates into copies": (
        lambda: (IteratesIntoCopies(f32(2, 3)), [f32(3), f32(3)], None, {}),
        TypeError,
        "^params: IteratesIntoCopies does not lend its memory through DLPack; expected an array of",
    ),
    "averages that iterate into copies": (
        lambda: ([f32(3), f32(3)], [f32(3), f32(3)], IteratesIntoCopies(f32(2, 3)), {}),
        TypeError,
        "^axs: IteratesIntoCopies does not lend its memory",
    ),
    "too many averages": (
        lambda: ([f32(3)], [f32(3)], [f32(3), f32(3)], {}),
        ValueError,
        "^axs: got 2 arrays for 1 params",
    ),
    "params that are no arrays": (
        lambda: ([[1.0, 2.0]], [f32(2)], None, {}),
        TypeError,
        r"^params\[0\]: list is not an array; expected an array of a library that speaks DLPack",
    ),
    "a grad of None": (
        lambda: ([f32(2)], [None], None, {}),
        TypeError,
        r"^grads\[0\]: NoneType is not an array",
    ),
    "an average of None": (
        lambda: ([f32(2)], [f32(2)], [None], {}),
        TypeError,
        r"^axs\[0\]: NoneType is not an array",
    ),
    "a number": (lambda: (3.0, f32(2), None, {}), TypeError, f"^params: {NOT_ARRAYS} float$"),
    "text": (lambda: ("ab", f32(2), None, {}), TypeError, f"^params: {NOT_ARRAYS} str$"),
    "a set": (lambda: ({1}, f32(2), None, {}), TypeError, f"^params: {NOT_ARRAYS} set$"),
    "a dict": (lambda: (f32(2), {"a": 1}, None, {}), TypeError, f"^grads: {NOT_ARRAYS} dict$"),
    "negative eta": (
        lambda: (f32(2), f32(2), None, {"eta": -1.0}),
        ValueError,
        r"^Invalid eta: -1\.0 \(expected a finite 0 <= eta\)$",
    ),
    "eta nan": (lambda: (f32(2), f32(2), None, {"eta": np.nan}), ValueError, "^Invalid eta: nan"),
    "eta as text": (
        lambda: (f32(2), f32(2), None, {"eta": "0.1"}),
        TypeError,
        "^eta: expected a real number, got '0.1' of type str$",
    ),
    "mu above 1": (
        lambda: (f32(2), f32(2), None, {"mu": 1.5}),
        ValueError,
        r"^Invalid mu: 1\.5 \(expected a finite 0 <= mu <= 1\)$",
    ),
    "lambd infinite": (
        lambda: (f32(2), f32(2), None, {"lambd": np.inf}),
        ValueError,
        "^Invalid lambd value: inf",
    ),
    "negative weight_decay": (
        lambda: (f32(2), f32(2), None, {"weight_decay": -0.1}),
        ValueError,
        r"^Invalid weight_decay value: -0\.1",
    ),
    "negative grad_scale": (
        lambda: (f32(2), f32(2), None, {"grad_scale": -1}),
        ValueError,
        "^Invalid grad_scale: -1",
    ),
}


def memory(*arguments):
    """Copy the memory of every array among the arguments, and of what they are views of."""
    found = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            found += memory(*argument)
        elif isinstance(argument, np.ndarray):
            found.append(argument.tobytes())
            found.append(bytes(argument if argument.base is None else argument.base))
        elif isinstance(argument, torch.Tensor) and argument.device.type == "cpu":
            found.append(argument.detach().clone().view(torch.uint8).tolist())
    return found


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_before_anything_is_written(what):
    call, error, message = REFUSED[what]
    params, grads, axs, options = call()
    before = memory(params, grads, axs)
    with pytest.raises(error, match=message):
        asgd_(params, grads, axs, **{"eta": 0.5, **options})
    assert memory(params, grads, axs) == before


@pytest.mark.parametrize("role", [0, 1, 2], ids=["param", "grad", "average"])
@pytest.mark.parametrize(
    "bad",
    [np.ones(3, np.int32), f32(4), f32(8)[::2]],
    ids=["dtype", "shape", "strides"],
)
def test_rows_before_a_refused_one_are_not_written(role, bad):
    arguments = [[f32(3) for _ in range(20)] for _ in range(3)]
    arguments[role][-1] = bad
    before = memory(*arguments)
    with pytest.raises(ValueError, match=r"\[19\]: "):
        asgd_(*arguments, eta=0.5, mu=0.5)
    assert memory(*arguments) == before


def records(dtype, n):
    """Numbers within records of 11 bytes: neither aligned nor at multiples of their size."""
    return np.zeros(n, np.dtype([("a", "S3"), ("x", dtype)], align=False))["x"]


def filled(empty, values):
    empty[...] = values
    return empty


VALUES = np.arange(24.0).reshape(2, 3, 4)
GRADS = {
    "fortran": lambda: np.asfortranarray(VALUES),
    "permuted": lambda: filled(np.empty((4, 2, 3)).transpose(1, 2, 0), VALUES),
    "reversed": lambda: filled(np.empty((2, 3, 4))[::-1, :, ::-1], VALUES),
    "every other": lambda: filled(np.empty((4, 6, 8))[::2, 1::2, ::2], VALUES),
    "broadcast": lambda: np.broadcast_to(VALUES[:, :1], VALUES.shape),
    "read-only": lambda: read_only(np.asfortranarray(VALUES)),
    "records": lambda: filled(records("f8", 24).reshape(2, 3, 4), VALUES),
    "unaligned": lambda: filled(
        np.frombuffer(bytearray(8 * 24 + 1), offset=1).reshape(2, 3, 4), VALUES
    ),
    "torch": lambda: torch.tensor(VALUES).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "legacy capsule": lambda: exporters.Legacy(np.asfortranarray(VALUES)),
    "versioned capsule": lambda: exporters.Versioned(VALUES[::-1].copy()[::-1]),
    "exchange API": lambda: exporters.Exchange(VALUES[::-1].copy()[::-1]),
}


@pytest.mark.parametrize("what", GRADS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)], ids=["C", "permuted"])
def test_a_grad_in_any_layout_is_taken(what, axes):
    grad = GRADS[what]()
    values = VALUES[:, :1] + 0 * VALUES if what == "broadcast" else VALUES
    param, ax = (np.ones([VALUES.shape[i] for i in axes]).transpose(np.argsort(axes)) for _ in "pa")
    expected = 1 - 0.5 * values
    asgd_(param, grad, ax, eta=0.5, lambd=0.0, mu=0.25)
    assert np.array_equal(param, expected)
    assert np.array_equal(ax, 1 + (expected - 1) * 0.25)
    optimizer = ArrayASGD(param, lr=0.5, lambd=0.0)
    optimizer.step([grad])
    assert np.array_equal(param, expected - 0.5 * values)
    assert np.array_equal(grad.array if hasattr(grad, "array") else grad, values)
    if hasattr(grad, "loans"):
        exporters.assert_given_back([grad])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
def test_a_transposed_grad_keeps_its_bits(dtype, seeded):
    grad = torch.randn(5, 7).to(dtype)
    grad[0, 0] = float("nan")
    param, theirs = torch.zeros(7, 5, dtype=dtype), torch.zeros(7, 5, dtype=dtype)
    asgd_(param, grad.t(), eta=1.0, lambd=0.0)
    asgd_(theirs, grad.t().contiguous(), eta=1.0, lambd=0.0)
    assert torch.equal(param.view(torch.uint8), theirs.view(torch.uint8))


def test_a_grad_that_is_a_view_of_its_param_in_another_layout_is_copied_first():
    param = np.arange(9.0).reshape(3, 3)
    expected = param - 0.5 * param.T
    asgd_(param, param.T, eta=0.5, lambd=0.0)
    assert np.array_equal(param, expected)


def test_scalars_of_numpy_are_grads_of_params_without_axes():
    param = np.ones(())
    asgd_(param, np.float64(0.5), eta=1.0, lambd=0.0)
    asgd_([param], [np.float64(0.25)], eta=1.0, lambd=0.0)
    assert param == 0.25
    optimizer = ArrayASGD([param, np.ones(2)], lr=1.0, lambd=0.0)
    optimizer.step([np.float64(0.125), None])
    assert param == 0.125


@pytest.mark.parametrize("attribute", ["shape", "dtype", "__array__", "__array_interface__"])
def test_what_iterates_into_copies_is_no_sequence_of_arrays(attribute):
    """Its copies would be updated and dropped."""
    rows = type("Dataset", (), {attribute: None, "__iter__": lambda _: iter([f32(2), f32(2)])})
    message = "^params: Dataset does not lend its memory through DLPack; expected an array of"
    with pytest.raises(TypeError, match=message):
        asgd_(rows(), [f32(2), f32(2)], eta=0.5)
    with pytest.raises(TypeError, match=message):
        ArrayASGD(rows())


def test_a_read_only_grad_is_only_read():
    param = f32(3)
    asgd_(param, read_only(f32(3)), eta=0.5, lambd=0.0)
    assert param.tolist() == [0.5, 0.5, 0.5]


def test_one_grad_may_serve_two_params():
    one, two, grad = f32(3), f32(3), f32(3)
    asgd_([one, two], [grad, grad], eta=0.25, lambd=0.0)
    assert one.tolist() == two.tolist() == [0.75] * 3


def test_a_grad_that_is_copied_is_read_before_anything_is_written():
    square, line = np.arange(9.0).reshape(3, 3), np.arange(8.0)
    asgd_([square, line[:4]], [square.T, line[::-2]], eta=0.5, lambd=0.0)
    assert square.tolist() == [[0, -0.5, -1], [2.5, 2, 1.5], [5, 4.5, 4]]
    assert line.tolist() == [-3.5, -1.5, 0.5, 2.5, 4, 5, 6, 7]


def test_neighbours_in_one_buffer_do_not_overlap():
    buffer = np.zeros(12)
    param, ax, grad = buffer[:4], buffer[4:8], buffer[8:]
    grad[:] = 1
    asgd_(param, grad, ax, eta=0.5, mu=0.5)
    assert buffer.tolist() == [-0.5] * 4 + [-0.25] * 4 + [1.0] * 4


def test_a_mix_of_shapes_dtypes_and_libraries():
    params = [f32(3), np.ones(()), np.ones((2, 0)), torch.ones(2, 2), torch.ones(1)]
    grads = [np.full_like(p, 2) if isinstance(p, np.ndarray) else p * 2 for p in params]
    axs = [p * 0 for p in params]
    axs[1] = np.zeros(())
    asgd_(params, grads, axs, eta=0.25, lambd=0.0, mu=0.5)
    for param, ax in zip(params, axs, strict=True):
        assert np.all(np.from_dlpack(param) == 0.5)
        assert np.all(np.from_dlpack(ax) == 0.25)


def test_takes_tuples_iterators_and_numpy_scalars():
    params = (f32(2), f32(3))
    asgd_(iter(params), (f32(n) for n in (2, 3)), eta=np.float32(0.5), lambd=np.array(0.0))
    assert [p.tolist() for p in params] == [[0.5] * 2, [0.5] * 3]


def test_an_error_of_the_callers_own_iterator_comes_through():
    def broken():
        yield f32(2)
        raise TypeError("the caller's own")

    with pytest.raises(TypeError, match=r"^the caller's own$"):
        asgd_(broken(), [f32(2)], eta=0.1)


def test_an_empty_sequence_is_no_step():
    assert asgd_([], [], [], eta=0.1) is None


@settings(deadline=None)
@given(data=st.data())
def test_any_axis_order_is_updated_in_place(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5), "shape")
    axes = data.draw(st.permutations(range(len(shape))), "axes")
    rng = np.random.default_rng(0)
    param, grad, ax = (rng.standard_normal(shape).transpose(axes) for _ in range(3))
    expected = param - 0.5 * grad
    expected_ax = ax + (expected - ax) * 0.25
    asgd_(param, grad, ax, eta=0.5, lambd=0.0, mu=0.25)
    assert np.array_equal(param, expected)
    assert np.array_equal(ax, expected_ax)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=8), cut=st.integers(0, 40))
def test_many_arrays_are_updated_as_each_alone(sizes, cut):
    rng = np.random.default_rng(sum(sizes))
    together = [[rng.standard_normal(n) for n in sizes] for _ in range(3)]
    alone = [[array.copy() for array in arrays] for arrays in together]
    options = {"eta": 0.1, "mu": 0.3, "weight_decay": 0.01}
    asgd_(*together, **options)
    for param, grad, ax in zip(*alone, strict=True):
        # Cutting an array in two moves where the vectors of the loop begin.
        for part in (slice(None, cut), slice(cut, None)):
            asgd_(param[part], grad[part], ax[part], **options)
    for ours, expected in zip(together, alone, strict=True):
        for array, right in zip(ours, expected, strict=True):
            assert np.array_equal(array, right)


def test_the_stride_of_an_axis_of_one_element_does_not_matter():
    param, grad = np.ones((6, 1, 4)).T, np.ones((6, 1, 4))[:, ::-1].T
    assert param.strides != grad.strides
    asgd_(param, grad, eta=0.5, lambd=0.0)
    assert (param == 0.5).all()


def test_only_the_view_is_written():
    buffer = torch.ones(10)
    asgd_(buffer[3:6], torch.ones(3), eta=1.0, lambd=0.0)
    assert buffer.tolist() == [1.0] * 3 + [0.0] * 3 + [1.0] * 4


@pytest.mark.heavy
def test_allocates_nothing_that_grows_with_the_arrays():
    arrays = [np.ones(2_000_000) for _ in range(3)]
    asgd_(*arrays, eta=0.1, mu=0.5)
    tracemalloc.start()
    try:
        asgd_(*arrays, eta=0.1, mu=0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


@pytest.mark.heavy
def test_other_threads_run_during_the_pass():
    arrays = [np.ones(4_000_000) for _ in range(3)]
    entered, finished = threading.Event(), threading.Event()

    def work():
        entered.set()
        asgd_(*arrays, eta=0.1, mu=0.5)
        finished.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=work)
    # With so long an interval, another thread only runs where the pass itself lets go.
    sys.setswitchinterval(100)
    try:
        thread.start()
        entered.wait()
        ran_meanwhile = not finished.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert ran_meanwhile
