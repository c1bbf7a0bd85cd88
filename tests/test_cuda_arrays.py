"""Arrays in the memory of CUDA devices: the kernels' bits, and the launches that make them.

The driver is a stand-in whose devices have the host's memory: see fake_gpu. What it runs is the
kernels' own body, which must give the bits of the CPU's engine.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
from functools import partial

import fake_gpu
import numpy as np
import pytest
import torch
from averaging import asks_early

from asgd_fast import ArrayASGD, asgd_
from asgd_fast._rows.rows import Rows
from asgd_fast.cuda import build, intrinsics, kernels
from asgd_fast.cuda.launches import (
    AVERAGE,
    CHUNK_AT,
    COPY,
    FIRST_BITS,
    HEADER,
    HOW_AT,
    MU_AT,
    N_CHUNKS_AT,
    N_ROWS_AT,
    NEG_ETA_AT,
    NO_AVERAGE,
    PHASES,
    PLACE_AT,
    SETS_AT,
    TAIL_BITS,
    THREADS,
    UPDATE,
    keys_of,
    pack,
    row_words,
    run,
    set_words,
)

SETTINGS = {
    "plain": {"eta": 0.1, "lambd": 0.0},
    "decay": {"eta": 0.3, "lambd": 0.5},
    "weight decay": {"eta": 0.1, "weight_decay": 0.05},
    "maximize": {"eta": 0.1, "maximize": True, "weight_decay": 1e-46},
    "scaled": {"eta": 0.1, "grad_scale": 0.3, "weight_decay": 0.05},
    "nothing": {"eta": 0.0, "lambd": 0.0},
}


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu.installed(monkeypatch) as fake:
        yield fake


class Case:
    """Three arrays, on the CPU and on a device, with the same numbers.

    Parameters
    ----------
    dtype, average : str
    offset : int
        How many numbers each array begins after an address of 64 bytes; each array another if
        negative.
    """

    def __init__(self, n, dtype="float32", average=None, offset=0, device=0, seed=0):
        rng = np.random.default_rng(seed)
        self.device = device
        average = average or dtype
        places = (offset,) * 3 if offset >= 0 else (1, 2, 3)
        dtypes = (dtype, dtype, average)
        self.here = [_array(rng.normal(size=n), *how) for how in zip(dtypes, places, strict=True)]
        self.there = [_array(rng.normal(size=n), *how) for how in zip(dtypes, places, strict=True)]
        for one, other in zip(self.here, self.there, strict=True):
            other.copy_(one)

    def step(self, has_average=True, **settings):
        for arrays in (self.here, [_on_gpu(x, self.device) for x in self.there]):
            asgd_(*(arrays if has_average else arrays[:2]), **settings)

    def check(self):
        for one, other in zip(self.here, self.there, strict=True):
            assert torch.equal(_bits(one), _bits(other))


def _array(values, dtype, offset):
    dtype = getattr(torch, dtype)
    memory = torch.zeros(len(values) + 64, dtype=dtype)
    start = -memory.data_ptr() % 64 // memory.itemsize + offset
    memory[start : start + len(values)] = torch.from_numpy(values).to(dtype)
    return memory[start : start + len(values)]


def _bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _on_gpu(tensor, device=0):
    is_bfloat16 = tensor.dtype == torch.bfloat16
    array = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
    return fake_gpu.Array(array, device, is_bfloat16)


@pytest.mark.heavy
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("dtype", "average"), fake_gpu.PAIRS, ids=lambda x: x)
@pytest.mark.parametrize("mu", [None, 1.0, 0.3], ids=["no average", "copy", "average"])
def test_bits_are_those_of_the_cpu(gpu, dtype, average, mu, settings):
    for n in (1, 2, 7, 8, 9, 100, 4099, 8192, 8192 * 3 + 13):
        case = Case(n, dtype, average)
        case.step(mu is not None, mu=mu or 1.0, **settings)
        case.check()
    assert [launch.kind.job for launch in gpu.launches] == ["update"] * 9


@pytest.mark.parametrize(("dtype", "average"), fake_gpu.PAIRS, ids=lambda x: x)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, -1])
def test_misaligned_arrays_have_the_same_bits(gpu, dtype, average, offset):
    for n in (1, 3, 8, 17, 8192, 8192 + 5, 20_000):
        for mu in (1.0, 0.3):
            case = Case(n, dtype, average, offset)
            case.step(eta=0.1, mu=mu, weight_decay=0.1)
            case.check()


@pytest.mark.parametrize("weight_decay", [0.5, 1e-46])  # which is 0 in float32, but not left out
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_special_values_flow_through(gpu, dtype, weight_decay):
    case = Case(64, dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-45, 1e-7, 6e-8]
    special += [torch.finfo(getattr(torch, dtype)).max, torch.finfo(getattr(torch, dtype)).tiny]
    for arrays in (case.here, case.there):
        for k, array in enumerate(arrays):
            for i, x in enumerate(special):
                array[(i * (k + 1)) % 64] = x
    case.step(eta=0.1, mu=0.3, weight_decay=weight_decay)
    for one, other in zip(case.here, case.there, strict=True):
        number = ~one.isnan()
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(_bits(one)[number], _bits(other)[number])


def test_complex_arrays_are_pairs_of_numbers(gpu):
    rng = np.random.default_rng(0)
    here = [rng.normal(size=10).astype(np.complex64) * (1 + 2j) for _ in range(3)]
    there = [x.copy() for x in here]
    asgd_(*here, eta=0.1, mu=0.5)
    asgd_(*map(fake_gpu.Array, there), eta=0.1, mu=0.5)
    assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))


@pytest.mark.parametrize("n", [1, 124, 125, 380, 381, 1000, 1020, 1021, 2500])
def test_a_launch_takes_a_thousand_arrays(gpu, n):
    rng = np.random.default_rng(n)
    sizes = rng.integers(1, 50, size=n)
    here = [[rng.normal(size=k).astype(np.float32) for k in sizes] for _ in range(3)]
    there = [[x.copy() for x in arrays] for arrays in here]
    asgd_(*here, eta=0.1, mu=0.5)
    asgd_(*([fake_gpu.Array(x) for x in arrays] for arrays in there), eta=0.1, mu=0.5)
    for ours, theirs in zip(here, there, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))
    rows = [int(launch.words[N_ROWS_AT]) for launch in gpu.launches]
    assert rows == [1020] * (n // 1020) + [n % 1020] * (n % 1020 != 0)
    room = [512 if k < 125 else 1536 if k < 381 else 4095 for k in rows]
    assert [launch.kind.n_words for launch in gpu.launches] == room


def test_arrays_without_elements_need_no_launch(gpu):
    asgd_(*(fake_gpu.Array(np.ones((0, 3))) for _ in range(2)), eta=0.1)
    assert gpu.launches == []


@pytest.mark.heavy
def test_single_scalars_for_each_array(gpu):
    """Sets come from the end of the words, and meet the rows."""
    rng = np.random.default_rng(0)
    here = [rng.normal(size=7) for _ in range(900)]
    there = [x.copy() for x in here]
    for params, wrap in ((here, lambda x: x), (there, fake_gpu.Array)):
        optimizer = ArrayASGD([wrap(x) for x in params], t0=2, lambd=0.1)
        grads = np.random.default_rng(1)
        for k in range(6):
            new = [grads.normal(size=7) for _ in params]
            optimizer.step([wrap(x) if (i + k) % 3 else None for i, x in enumerate(new)])
        for i in range(900):
            optimizer.param_groups[0]["lr"] = 0.01 + i
            only = [None] * 900
            only[i] = wrap(new[i])
            optimizer.step(only)
        optimizer.step([wrap(x) for x in new])
    assert np.array_equal(here, there)
    assert [int(x.words[N_ROWS_AT]) for x in gpu.launches[-3:]] == [408, 408, 84]


def test_the_words_of_a_launch(gpu):
    sizes = [5, 0, 20_000, 8192]
    params = [np.zeros(n, np.float32) for n in sizes]
    grads = [np.ones(n, np.float32) for n in sizes]
    axs = [np.zeros(n, np.float32) for n in sizes]
    asgd_(
        [fake_gpu.Array(x) for x in params],
        [fake_gpu.Array(x) for x in grads],
        [fake_gpu.Array(x) for x in axs],
        eta=0.25,
        mu=0.5,
    )
    (launch,) = gpu.launches
    words = launch.words
    assert launch.kind == ("update", "float32", "float32", False, 512)
    assert (launch.device, launch.stream, launch.n_blocks) == (0, 0x70, 1 + 3 + 1)
    assert (words[N_ROWS_AT], words[N_CHUNKS_AT], words[CHUNK_AT]) == (3, 5, 8192)
    firsts, tails = [0, 1, 4], [5, 20_000 - 2 * 8192, 8192]
    for i, k in enumerate([0, 2, 3]):
        row = words[HEADER + i * row_words(False) :]
        assert list(row[:3]) == [x[k].ctypes.data for x in (params, grads, axs)]
        place = int(row[PLACE_AT])
        assert place & (1 << FIRST_BITS) - 1 == firsts[i]
        assert place >> FIRST_BITS & (1 << TAIL_BITS) - 1 == tails[i]
        assert place >> FIRST_BITS + TAIL_BITS == 0
    at = int(words[SETS_AT])
    assert at == HEADER + 3 * row_words(False)
    scalars = words[at : at + set_words(False)]
    assert scalars[NEG_ETA_AT : NEG_ETA_AT + 1].view(np.float32)[0] == -0.25
    assert scalars[MU_AT : MU_AT + 1].view(np.float32)[0] == 0.5
    assert scalars[HOW_AT] == AVERAGE


@pytest.mark.parametrize(("mu", "phase"), [(None, NO_AVERAGE), (1.0, COPY), (0.0, AVERAGE)])
def test_the_phase_of_a_set(gpu, mu, phase):
    p, g, a = (fake_gpu.Array(np.zeros(3)) for _ in range(3))
    asgd_(p, g, a if mu is not None else None, eta=0.1, mu=mu or 0.0)
    words = gpu.launches[0].words
    assert words[int(words[SETS_AT]) + HOW_AT] & PHASES == phase


def test_chunks_grow_with_the_work(gpu):
    n = 5_000_000
    arrays = [np.zeros(n, np.float16) for _ in range(2)]
    for multiprocessors, chunk in ((132, 8192), (8, 32768)):
        gpu.launches.clear()
        fake_gpu.device.device_of(0).multiprocessors = multiprocessors
        asgd_(*map(fake_gpu.Array, arrays), eta=0.1)
        (launch,) = gpu.launches
        assert launch.words[CHUNK_AT] == chunk
        assert launch.n_blocks == -(-n // chunk)


def test_the_last_chunk_may_be_a_whole_one(gpu):
    case = Case(2 * 32768)
    fake_gpu.device.device_of(0).multiprocessors = 0  # never enough
    case.step(eta=0.1, mu=0.5)
    case.check()
    assert gpu.launches[0].words[CHUNK_AT] == 32768


@pytest.mark.skipif(sys.platform != "linux", reason="memory is promised in another way there")
def test_more_than_two_to_the_33_elements(gpu):
    """In memory that is there only where it is touched, some blocks alone."""
    n = (1 << 33) + 12_345
    promised = 0x4000  # MAP_NORESERVE, which Python names since 3.12
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | promised
    arrays = [np.frombuffer(mmap.mmap(-1, 4 * n, flags=flags), np.float32) for _ in range(3)]
    places = (0, 1 << 31, 1 << 32, n - 1)
    for i in places:
        arrays[1][i] = 1
    rows = Rows(("p", "g", "a"))
    rows.extend(*([Described(gpu, x)] for x in arrays), eta=0.5, mu=1.0, lambd=0.0)
    (key,) = keys_of(rows)
    words = np.zeros(512, np.uint64)
    _, n_blocks, _ = pack(rows, key, 0, words, UPDATE, 4224)
    kind = build.Kind("update", "float32", "float32", False, 0)
    do_chunk = kernels.jobs_of(kind, intrinsics.make("cpu")).do_chunk
    for i in places:
        block = i // int(words[CHUNK_AT])
        assert block < n_blocks
        for thread in range(THREADS):
            do_chunk(words.ctypes.data, block, thread)
        for array in (arrays[0], arrays[2]):
            assert array[i] == -0.5
            assert array[i - 1] == 0


def test_an_old_driver_gets_small_launches(monkeypatch):
    with fake_gpu.installed(monkeypatch, version=12000) as gpu:
        arrays = [[np.zeros(3) for _ in range(300)] for _ in range(2)]
        asgd_(*([fake_gpu.Array(x) for x in each] for each in arrays), eta=0.1)
        assert [launch.kind.n_words for launch in gpu.launches] == [512, 512, 512]


def test_arrays_of_all_kinds_in_one_step(gpu):
    """One launch for each device and pair of dtypes; what the CPU has is updated there."""
    cases = [
        Case(100, "float32"),
        Case(200, "float64", device=1),
        Case(300, "float32", "float64"),
        Case(400, "float32", seed=1),
        Case(500, "bfloat16", device=1),
        Case(600, "float32", device=1),
    ]
    on_cpu = Case(700)
    here = [[case.here[k] for case in (*cases, on_cpu)] for k in range(3)]
    there = [[_on_gpu(case.there[k], case.device) for case in cases] for k in range(3)]
    for k in range(3):
        there[k].insert(2, on_cpu.there[k])
    asgd_(*here, eta=0.1, mu=0.5)
    asgd_(*there, eta=0.1, mu=0.5)
    for case in (*cases, on_cpu):
        case.check()
    launches = [(x.device, *x.kind[1:3], x.stream, int(x.words[N_ROWS_AT])) for x in gpu.launches]
    assert launches == [
        (0, "float32", "float32", 0x70, 2),
        (1, "float64", "float64", 0x71, 1),
        (0, "float32", "float64", 0x70, 1),
        (1, "bfloat16", "bfloat16", 0x71, 1),
        (1, "float32", "float32", 0x71, 1),
    ]


def test_the_default_stream_is_named(gpu, monkeypatch):
    monkeypatch.setitem(fake_gpu.streams, 0, 0)
    asgd_(*(fake_gpu.Array(np.zeros(3)) for _ in range(2)), eta=0.1)
    assert gpu.launches[0].stream == 1  # CU_STREAM_LEGACY


def test_the_stream_may_change_between_steps(gpu, monkeypatch):
    arrays = [fake_gpu.Array(np.zeros(3)) for _ in range(2)]
    for stream in (5, 6, 5):
        monkeypatch.setitem(fake_gpu.streams, 0, stream)
        asgd_(*arrays, eta=0.1)
    assert [launch.stream for launch in gpu.launches] == [5, 6, 5]


class WithoutExchangeAPI(fake_gpu.exporters.Versioned):
    """Lends capsules, to be asked for the device and told the stream."""

    told = None  # the stream

    def __dlpack_device__(self):
        return fake_gpu.exporters.CUDA, 0

    def __dlpack__(self, *, stream=None, max_version=None):
        self.told = stream
        return super().__dlpack__(max_version=max_version)


def _without_exchange_api(array):
    return WithoutExchangeAPI(array, device_type=fake_gpu.exporters.CUDA)


def test_a_library_without_the_exchange_api(gpu):
    """Its stream is not known: it lets the default one wait, and the host waits in the end."""
    arrays = [_without_exchange_api(np.ones(3)) for _ in range(2)]
    asgd_(*arrays, eta=0.25, lambd=0.0)
    assert arrays[0].array.tolist() == [0.75] * 3
    assert [x.told for x in arrays] == [1, 1]
    assert gpu.order == [("launch", 1), ("host waits for", 1)]


def test_a_gradient_of_an_unknown_stream(gpu):
    """Its library is told the stream of the params, to let it wait."""
    params = [fake_gpu.Array(np.ones(3)) for _ in range(2)]
    grads = [_without_exchange_api(np.ones(3)), fake_gpu.Array(np.ones(3))]
    asgd_(params, grads, eta=0.25, lambd=0.0)
    assert [x.array.tolist() for x in params] == [[0.75] * 3] * 2
    assert grads[0].told == 0x70
    assert gpu.order == [("launch", 0x70), ("host waits for", 0x70)]


def test_cupys_current_stream_is_asked(gpu, monkeypatch):
    class Stream:
        ptr = 0x99

    class Cuda:
        @staticmethod
        def get_current_stream(device):
            assert device == 0
            return Stream

    class Library:
        cuda = Cuda

    ndarray = type("ndarray", (WithoutExchangeAPI,), {"__module__": "cupy._core.core"})
    monkeypatch.setitem(sys.modules, "cupy", Library)
    arrays = [ndarray(np.ones(3), device_type=fake_gpu.exporters.CUDA) for _ in range(2)]
    asgd_(*arrays, eta=0.1)
    assert gpu.order == [("launch", 0x99)]
    assert [x.told for x in arrays] == [-1, -1]
    gpu.order.clear()
    asgd_(fake_gpu.Array(np.ones(3)), arrays[1], eta=0.1)
    assert arrays[1].told == -1
    assert gpu.order == [(0x70, "waits for", 0x99), ("launch", 0x70), (0x99, "waits for", 0x70)]


class Described:
    """An array as Numba's devices have it: described by a dict."""

    def __init__(self, gpu, array, device=0, **others):
        self.array, self.others = array, others
        gpu.devices[array.ctypes.data] = device

    @property
    def __cuda_array_interface__(self):
        interface = self.array.__array_interface__
        return {**interface, "version": 3, "stream": 0x55, **self.others}


def test_streams_of_several_libraries_are_ordered(gpu):
    """The step follows what has been asked for on each, and is followed by what will be."""
    p, g, ax = np.ones(3), np.ones(3), np.ones(3)
    for _ in range(3):
        gpu.order.clear()
        asgd_(fake_gpu.Array(p), Described(gpu, g), Described(gpu, ax, stream=0x56), eta=0.1)
        before, (launch,), after = gpu.order[:2], gpu.order[2:3], gpu.order[3:]
        assert set(before) == {(0x70, "waits for", 0x55), (0x70, "waits for", 0x56)}
        assert launch == ("launch", 0x70)
        assert set(after) == {(0x55, "waits for", 0x70), (0x56, "waits for", 0x70)}
    assert gpu.n_events == 3


def test_streams_are_ordered_on_each_device(gpu):
    params = [fake_gpu.Array(np.ones(3), device) for device in (0, 1, 0, 1)]
    grads = [Described(gpu, np.ones(3), device, stream=0x71) for device in (0, 1, 0, 1)]
    asgd_(params, grads, eta=0.1)
    assert gpu.order == [
        (0x70, "waits for", 0x71),
        ("launch", 0x70),
        ("launch", 0x71),
        (0x71, "waits for", 0x70),
    ]


def test_streams_are_forgotten_after_the_step(gpu, monkeypatch):
    p, g = fake_gpu.Array(np.ones(3)), np.ones(3)
    optimizer = ArrayASGD([p])
    optimizer.step([Described(gpu, g)])
    assert len(gpu.order) == 3
    gpu.order.clear()
    monkeypatch.setitem(fake_gpu.streams, 0, 0x55)
    optimizer.step([Described(gpu, g)])
    optimizer.step([fake_gpu.Array(g)])
    assert gpu.order == [("launch", 0x55)] * 2


@pytest.mark.parametrize("stream", [None, 1])
def test_the_default_stream_has_one_name(gpu, monkeypatch, stream):
    monkeypatch.setitem(fake_gpu.streams, 0, 0)
    asgd_(fake_gpu.Array(np.ones(3)), Described(gpu, np.ones(3), stream=stream), eta=0.1)
    assert gpu.order == [("launch", 1)]


@asks_early
def test_copies_of_averages_are_ordered_too(gpu):
    params = [fake_gpu.Array(np.ones(3))]
    optimizer = ArrayASGD(params, t0=1)
    optimizer.step([fake_gpu.Array(np.ones(3))])
    gpu.order.clear()
    optimizer.copy_averages_to([Described(gpu, np.zeros(3))])
    assert gpu.order == [(0x55, "waits for", 0x70), ("launch", 0x55), (0x70, "waits for", 0x55)]


def test_a_refused_call_orders_nothing(gpu):
    gpu.captured.add(0x70)
    with pytest.raises(RuntimeError, match="captured"):
        asgd_(fake_gpu.Array(np.ones(3)), Described(gpu, np.ones(3)), eta=0.1)
    assert gpu.order == []


def test_arrays_of_numbas_devices(gpu):
    rng = np.random.default_rng(0)
    here = [np.asfortranarray(rng.normal(size=(3, 4))) for _ in range(3)]
    there = [x.copy("F") for x in here]
    asgd_(*here, eta=0.1, mu=0.5)
    asgd_(*(Described(gpu, x, 1) for x in there), eta=0.1, mu=0.5)
    assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
    assert (gpu.launches[0].device, gpu.launches[0].stream) == (1, 0x55)


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"typestr": "<i8"}, ValueError, "params: dtype int64 is not supported"),
        ({"typestr": ">f8"}, ValueError, "params: .*another machine's order"),
        ({"mask": "some"}, ValueError, "params: .*it has a mask"),
        ({"data": (64, True)}, BufferError, "params: it is read-only"),
        ({"strides": (16,)}, ValueError, r"params: strides \(2,\) of shape \(4,\) leave gaps"),
    ],
    ids=["dtype", "byte order", "mask", "read-only", "strided"],
)
def test_unfit_arrays_of_numbas_devices(gpu, others, error, message):
    gpu.devices[64] = 0
    with pytest.raises(error, match=message):
        asgd_(Described(gpu, np.ones(4), **others), Described(gpu, np.ones(4)), eta=0.1)
    assert gpu.launches == []


def test_a_capture_is_refused(gpu):
    """eta, mu and the addresses of the gradients would stay what they are."""
    gpu.captured.add(0x71)
    there = [fake_gpu.Array(np.ones(3), device) for device in (0, 1)]
    grads = [fake_gpu.Array(np.ones(3), device) for device in (0, 1)]
    with pytest.raises(RuntimeError, match=r"stream is being captured into a CUDA graph.*captu"):
        asgd_(there, grads, eta=0.1)
    assert gpu.launches == []
    assert all(x.array.tolist() == [1.0] * 3 for x in there)


def test_devices_must_match(gpu):
    p, g = fake_gpu.Array(np.ones(3), 0), fake_gpu.Array(np.ones(3), 1)
    message = "grads: device cuda:1 does not match params of device cuda:0$"
    with pytest.raises(ValueError, match=message):
        asgd_(p, g, eta=0.1)
    with pytest.raises(ValueError, match="axs: device cpu:0 does not match params of device cuda"):
        asgd_(p, fake_gpu.Array(np.ones(3)), np.ones(3), eta=0.1)
    assert gpu.launches == []


def test_overlap_is_refused_on_a_device_too(gpu):
    memory = np.ones(5)
    arrays = [fake_gpu.Array(x) for x in (memory[:3], memory[2:])]
    with pytest.raises(ValueError, match="grads: shares memory with params"):
        asgd_(*arrays, eta=0.1)
    assert memory.tolist() == [1.0] * 5


def test_a_device_that_is_not_there(gpu):
    p, g = (fake_gpu.Array(np.ones(3), 7) for _ in range(2))
    fake_gpu.streams[7] = 0
    with pytest.raises(RuntimeError, match=r"CUDA: unspecified launch failure \(CUDA_ERROR"):
        asgd_(p, g, eta=0.1)


def test_a_capture_of_another_librarys_stream_is_refused(gpu):
    """The launch would be part of it, as that stream is waited for."""
    p, g = np.ones(3), np.ones(3)
    gpu.captured.add(0x55)
    with pytest.raises(RuntimeError, match="captured into a CUDA graph"):
        asgd_(fake_gpu.Array(p), Described(gpu, g), eta=0.1)
    assert p.tolist() == [1.0] * 3
    assert gpu.order == []


def test_a_threads_own_stream_has_an_event_for_each_thread(gpu):
    """It has one number for all threads, and is another in each."""

    together = threading.Barrier(2)

    def step():
        p, g = np.ones(3), np.ones(3)
        for _ in range(2):
            asgd_(Described(gpu, p, stream=0x70), Described(gpu, g, stream=2), eta=0.1)
        together.wait()

    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu.n_events == 3  # of the first one's, of the launch's, of the second one's


@pytest.mark.parametrize("fault", [ImportError("no package"), RuntimeError("no driver")], ids=str)
def test_arrays_that_are_described_need_a_driver_too(gpu, monkeypatch, fault):
    def driver():
        raise fault

    arrays = [Described(gpu, np.ones(3)) for _ in range(2)]
    monkeypatch.setattr(fake_gpu.device, "driver", driver)
    with pytest.raises(type(fault), match=str(fault)):
        asgd_(*arrays, eta=0.1)


def test_strides_that_are_no_multiples_are_refused(gpu):
    """As those of a field of a record, whose neighbour would be written to."""
    records = np.ones(8, np.dtype([("x", "f4"), ("y", "i2")]))
    x = records["x"]
    with pytest.raises(
        ValueError, match=r"params: .*strides \(6,\) are no multiples of its 4-byte"
    ):
        asgd_(Described(gpu, x, data=(x.ctypes.data, False)), Described(gpu, np.ones(8)), eta=0.1)
    assert records.tolist() == [(1.0, 1)] * 8


@pytest.mark.heavy  # and a tracer runs Python code at each line
def test_no_interrupt_comes_between_the_calls_of_a_launch():
    """None of them runs Python code here, as none of the driver's does; the status is None."""
    contexts, launched = [], []
    interrupt = ctypes.CDLL(None)["raise"]  # Python's own would look for interrupts
    interrupt.restype = None
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = [
        (
            partial(tuple, map(contexts.append, ["context"])),
            partial(tuple, map(interrupt, [signal.SIGINT])),
            partial(tuple, map(launched.append, [1])),
            partial(tuple, map(contexts.remove, ["context"])),
        )
    ]
    try:
        with pytest.raises(KeyboardInterrupt):
            run(calls, None)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (contexts, launched) == ([], [1])


def test_a_context_that_cannot_be_entered_is_not_left(gpu, monkeypatch):
    arrays = [fake_gpu.Array(np.ones(3)) for _ in range(2)]
    asgd_(*arrays, eta=0.1)
    n = len(gpu.launches)
    gpu.contexts.append("the caller's")
    pushes = iter([gpu.cuCtxPushCurrent, lambda context: (fake_gpu.REFUSED,)])
    monkeypatch.setattr(gpu, "cuCtxPushCurrent", lambda context: next(pushes)(context))
    with pytest.raises(RuntimeError, match="CUDA_ERROR"):
        asgd_(*arrays, eta=0.1)
    assert gpu.contexts == ["the caller's"]
    assert len(gpu.launches) == n
    gpu.contexts.clear()


def test_a_launch_that_fails(gpu):
    gpu.fails = True
    with pytest.raises(RuntimeError, match=r"CUDA: unspecified launch failure \(CUDA_ERROR"):
        asgd_(*(fake_gpu.Array(np.ones(3)) for _ in range(2)), eta=0.1)
    gpu.fails = False
    asgd_(*(fake_gpu.Array(np.ones(3)) for _ in range(2)), eta=0.1)
    assert len(gpu.launches) == 1


def test_a_driver_that_is_too_old_for_a_kernel(gpu):
    gpu.is_old, gpu.version = True, 12040
    p, g = np.ones(3), np.ones(3)
    with pytest.raises(RuntimeError, match=r"CUDA 12\.4, did not load.*'numba-cuda\[cu12\]'$"):
        asgd_(fake_gpu.Array(p), fake_gpu.Array(g), eta=0.1)
    assert p.tolist() == [1.0] * 3
    assert gpu.contexts == []


def test_kernels_are_loaded_once_for_each_device(gpu):
    for device in (0, 1, 0, 1):
        asgd_(*(fake_gpu.Array(np.ones(3), device) for _ in range(2)), eta=0.1)
    assert [context[1] for context, _ in gpu.loaded] == [0, 1]


def test_arrays_are_given_back(gpu):
    arrays = [fake_gpu.Array(np.ones(3)) for _ in range(3)]
    asgd_(*arrays, eta=0.1)
    fake_gpu.exporters.assert_given_back(arrays)


# ArrayASGD


def _optimizers(gpu_dtype="float32", **options):
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (20_000,), (5,)]
    here = [rng.normal(size=shape).astype(gpu_dtype) for shape in shapes]
    here[0] = np.asfortranarray(here[0])
    there = [x.copy("K") for x in here]
    ours = ArrayASGD([fake_gpu.Array(x) for x in there], **options)
    return here, there, ArrayASGD(here, **options), ours, rng


def _step(optimizer, params, rng, on_gpu):
    grads = [rng.normal(size=x.shape).astype(x.dtype) for x in params]
    grads[0] = np.asfortranarray(grads[0])
    optimizer.step([fake_gpu.Array(x) for x in grads] if on_gpu else grads)


def _run(steps, here, there, theirs, ours):
    for k in range(steps):
        _step(theirs, here, np.random.default_rng(k), False)
        _step(ours, there, np.random.default_rng(k), True)
        for x, y in zip(here, there, strict=True):
            assert np.array_equal(x, y)
        for x, y in zip(theirs.averages, ours.averages, strict=True):
            assert np.array_equal(x, y.array)


@pytest.mark.parametrize(
    "options",
    [
        {"t0": 3},
        {"t0": 2, "weight_decay": 0.1, "maximize": True, "alpha": 1.0},
        {"t0": 2, "average_dtype": "float64"},
        {"t0": 2, "lr_schedule": "current", "average_every": 2},
        {"t0": 2, "averaging": ("ema", 0.8)},
    ],
    ids=["usual", "weight decay", "wide", "current, every second", "decayed"],
)
@asks_early
def test_a_run_has_the_bits_of_the_cpu(gpu, options):
    here, there, theirs, ours, _ = _optimizers(lr=0.1, lambd=0.01, **options)
    _run(20, here, there, theirs, ours)


@pytest.mark.parametrize("average_dtype", [None, "float64"], ids=["narrow", "wide"])
@asks_early
def test_averaged_parameters(gpu, average_dtype):
    here, there, theirs, ours, _ = _optimizers(t0=1, average_dtype=average_dtype)
    _run(6, here, there, theirs, ours)
    before = [x.copy() for x in there]
    with theirs.averaged_parameters(), ours.averaged_parameters():
        assert not np.array_equal(there[1], before[1])
        for x, y in zip(here, there, strict=True):
            assert np.array_equal(x, y)
    for x, y in zip(before, there, strict=True):
        assert np.array_equal(x, y)
    _run(3, here, there, theirs, ours)


@asks_early
def test_averaged_parameters_of_halves_keep_their_bits(gpu):
    """Not a number among them: they are moved, not converted."""
    here, there, theirs, ours, _ = _optimizers("float16", t0=1)
    _run(4, here, there, theirs, ours)
    there[1].view(np.uint16)[:2] = 0x7C01, 0xFE12
    before = [x.view(np.uint16).copy() for x in there]
    with ours.averaged_parameters():
        pass
    assert all(np.array_equal(x.view(np.uint16), y) for x, y in zip(there, before, strict=True))


@pytest.mark.parametrize("average_dtype", [None, "float64"], ids=["narrow", "wide"])
@asks_early
def test_copy_averages_to(gpu, average_dtype):
    here, there, theirs, ours, _ = _optimizers(t0=1, average_dtype=average_dtype)
    _run(5, here, there, theirs, ours)
    targets = [np.zeros_like(x) for x in here]
    others = [np.zeros_like(x) for x in here]
    theirs.copy_averages_to(targets)
    ours.copy_averages_to([fake_gpu.Array(x) for x in others])
    assert all(np.array_equal(x, y) for x, y in zip(targets, others, strict=True))


@asks_early
def test_a_checkpoint_goes_from_one_device_to_the_other(gpu):
    here, there, theirs, ours, _ = _optimizers(t0=1)
    _run(5, here, there, theirs, ours)
    state = ours.state_dict()
    expected = theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(state[name], value)
        assert state[name].strides == value.strides
    assert gpu.waits == [0x70] * 3
    again = [x.copy("K") for x in there]
    other = ArrayASGD([fake_gpu.Array(x) for x in again])
    other.load_state_dict(expected)
    _run(5, here, again, theirs, other)
