"""The kernels in Numba's simulator, against the CPU's engine.

It takes a process of its own: ``NUMBA_ENABLE_CUDASIM=1 python simulator.py``.

What Numba compiles to LLVM has a stand-in here, in NumPy and the C library: a vector is an array.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import threading
from types import SimpleNamespace

import fake_gpu
import numpy as np
import torch
from numba import config, cuda

from asgd_fast import Schedule, asgd_
from asgd_fast._rows.rows import Rows
from asgd_fast.cuda import build, kernels
from asgd_fast.cuda import launches as layout
from asgd_fast.cuda.launches import UPDATE, keys_of, pack

# Of a block: so few that it is quick to simulate.
THREADS = 8

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_FMA = {np.dtype("f4"): _libm.fmaf, np.dtype("f8"): _libm.fma}
for dtype, function in _FMA.items():
    kind = ctypes.c_float if dtype.itemsize == 4 else ctypes.c_double
    function.restype, function.argtypes = kind, [kind] * 3

_STORED = {"float16": "f2", "bfloat16": "u2", "float32": "f4", "float64": "f8"}
_STORED |= {"bits16": "u2", "bits32": "u4", "bits64": "u8"}
_COMPUTED = {**_STORED, "float16": "f4", "bfloat16": "f4"}


def _memory(address, n, dtype):
    size = n * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def _widen(x, stored, dtype):
    if stored == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(dtype)


def _narrow(x, stored):
    if stored != "bfloat16":
        return x.astype(_STORED[stored])
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


# The addresses of vectors that were loaded: whole accesses, which memory must be aligned for.
vectors = []


def _memory_of(dtype, lanes, parts=1, stride=0):
    size = np.dtype(_STORED[dtype]).itemsize

    def addresses(array, i):
        return [array + (i + k * stride) * size for k in range(parts)]

    def load(array, i):
        if lanes > 1:
            vectors.extend(addresses(array, i))
        memory = [_memory(address, lanes, _STORED[dtype]) for address in addresses(array, i)]
        return _widen(np.concatenate(memory), dtype, _COMPUTED[dtype])

    def store(array, i, vector):
        assert vector.dtype == _COMPUTED[dtype]
        for address, part in zip(addresses(array, i), np.split(vector, parts), strict=True):
            assert lanes == 1 or address % 16 == 0
            _memory(address, lanes, _STORED[dtype])[:] = _narrow(part, dtype)

    return load, store


def _fma(x, y, z):
    x, y, z = np.broadcast_arrays(x, y, z)
    fused = [_FMA[z.dtype](*lanes) for lanes in zip(x, y, z, strict=True)]
    return np.array(fused, z.dtype)


_lock = threading.Lock()


def _ticket(address, last):
    with _lock:
        counter = _memory(address, 1, "u4")
        ticket = int(counter[0])
        counter[0] = 0 if ticket >= last else ticket + 1
        return ticket


def _write(dtype):
    def write(address, x):
        _memory(address, 1, dtype)[0] = x

    return write


OPERATIONS = SimpleNamespace(
    function=lambda function: function,
    word=lambda words, i: int(_memory(words + 8 * i, 1, "i8")[0]),
    real={
        "float32": lambda word: np.int64(word).reshape(1).view("f4")[0],
        "float64": lambda word: np.int64(word).reshape(1).view("f8")[0],
    },
    memory=_memory_of,
    add=lambda x, y: x + y,
    sub=lambda x, y: x - y,
    mul=lambda x, y: x * y,
    fma=_fma,
    select=lambda condition, x, y: x if condition else y,
    convert=lambda dtype: lambda x: x.astype(_COMPUTED[dtype]),
    rounded=lambda stored: lambda x: _widen(_narrow(x, stored), stored, x.dtype),
    read_real={
        dtype: lambda address, dtype=dtype: _memory(address, 1, dtype)[0]
        for dtype in ("float32", "float64")
    },
    write_real={dtype: _write(dtype) for dtype in ("float32", "float64")},
    ticket=_ticket,
)


def _random(rng, n, dtype, offset):
    """Numbers in memory that begins so many of them after an address of 16 bytes."""
    stored = np.dtype(_STORED[dtype])
    memory = np.zeros(n + 32, stored)
    start = -memory.ctypes.data % 16 // stored.itemsize + offset
    memory[start : start + n] = _narrow(rng.normal(size=n).astype("f4"), dtype)
    return memory[start : start + n]


def _array(numbers, dtype):
    return fake_gpu.Array(numbers, bfloat16=dtype == "bfloat16")


def _launch(kind, words, n_blocks):
    cuda.jit(kernels.kernel(kind, OPERATIONS))[n_blocks, THREADS](words.ctypes.data)


def check_update(dtype, average, offsets, mu, weight_decay):
    """Compare a launch with the CPU's engine, which is given the same numbers."""
    rng = np.random.default_rng(0)
    here = [[], [], []]
    there = [[], [], []]
    for n in (1, 3, 40, 9000):
        for k, kind in enumerate((dtype, dtype, average)):
            here[k].append(_random(rng, n, kind, 0))
            there[k].append(_random(rng, n, kind, offsets[k]))
            there[k][-1][:] = here[k][-1]
    rows = Rows(("", "", ""))
    settings = {"eta": 0.1, "mu": mu, "weight_decay": weight_decay, "grad_scale": 0.7}
    arrays = [[_array(x, dtype if k < 2 else average) for x in there[k]] for k in range(3)]
    rows.extend(*arrays, lambd=0.5, **settings)
    (key,) = keys_of(rows)
    words = np.zeros(512, np.uint64)
    stop, n_blocks, _ = pack(rows, key, 0, words, UPDATE, 99)
    assert (stop, n_blocks) == (4, 5)
    vectors.clear()
    _launch(build.Kind("update", dtype, average, False, 512), words, n_blocks)
    # Arrays that are misaligned alike are mostly done by vectors, others not at all.
    assert all(address % 16 == 0 for address in vectors)
    assert bool(vectors) == (len(set(offsets)) == 1)
    as_torch = [
        [
            torch.from_numpy(x.view("i2")).view(torch.bfloat16) if x.dtype == "u2" else x
            for x in arrays
        ]
        for arrays in here
    ]
    asgd_(*as_torch, lambd=0.5, **settings)
    for ours, theirs in zip(there, here, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def check_device_scalars(averaging):
    """The last block advances the scalars that all others have read, unless a step is skipped."""
    schedule = Schedule(lr=0.1, lambd=0.25, alpha=0.5, t0=2, averaging=averaging)
    rng = np.random.default_rng(0)
    params, grads, axs = (rng.normal(size=(2, 20_000)) for _ in range(3))
    expected = params.copy(), axs.copy()
    scalars = np.array([[0, 0.1, 1]] * 2 + [[0, 0, 0]], "f8")
    scale, found_inf = np.array([4.0], "f4"), np.array([0.0], "f4")
    n_rows, chunk = 2, 8192
    words = np.zeros(512, np.uint64)
    row_size = layout.row_words(True)
    sets = layout.HEADER + n_rows * row_size
    words[layout.N_ROWS_AT], words[layout.N_CHUNKS_AT], words[layout.CHUNK_AT] = n_rows, 6, chunk
    words[layout.SETS_AT], words[layout.TICKET_AT] = sets, scalars[2:].ctypes.data
    words[layout.LOSS_SCALE_AT], words[layout.FOUND_INF_AT] = (
        scale.ctypes.data,
        found_inf.ctypes.data,
    )
    for i in range(n_rows):
        row = words[layout.HEADER + i * row_size :]
        row[:3] = [x[i].ctypes.data for x in (params, grads, axs)]
        row[layout.PLACE_AT] = 3 * i | (20_000 - 2 * chunk) << layout.FIRST_BITS
        row[layout.SCALARS_AT] = scalars[i:].ctypes.data
    values = {
        layout.LR_AT: 0.1,
        layout.LAMBD_AT: 0.25,
        layout.ALPHA_AT: 0.5,
        layout.T0_AT: 2,
        layout.EVERY_AT: 1,
        layout.EMA_DECAY_AT: averaging[1] if averaging[0] == "ema" else 1,
        layout.POWER_AT: averaging[1] if averaging[0] == "polynomial" else 0,
        layout.SIGN_AT: 1,
    }
    for place, value in values.items():
        words[sets + place] = np.float64(value).view(np.uint64)
    words[sets + layout.FLAGS_AT] = layout.SCALARS_ARE_DOUBLE
    for k in range(6):
        found_inf[0] = k == 3
        _launch(build.Kind("update", "float64", "float64", True, 512), words, 6)
        if k != 3:
            asgd_(
                list(expected[0]),
                list(grads),
                list(expected[1]),
                eta=schedule.eta,
                mu=schedule.mu,
                lambd=0.25,
                grad_scale=0.25,
            )
            schedule.advance()
        assert scalars.tolist() == [[schedule.step, schedule.eta, schedule.mu]] * 2 + [[0, 0, 0]]
        assert np.array_equal(params, expected[0])
        assert np.array_equal(axs, expected[1])


def check_exchange(bits):
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 99, 9000).astype(_STORED[bits]) for _ in range(2))
    before = one.copy(), other.copy()
    floats = [fake_gpu.Array(x.view(f"f{x.itemsize}")) for x in (one, other)]
    for job, expected in ((layout.SWAP, (1, 0)), (layout.ASSIGN, (0, 0))):
        rows = Rows(("", "", ""))
        rows.extend(floats[:1], None, floats[1:])
        (key,) = keys_of(rows)
        words = np.zeros(512, np.uint64)
        _, n_blocks, _ = pack(rows, key, 0, words, job, 99)
        _launch(build.Kind("exchange", bits, bits, False, 512), words, n_blocks)
        assert np.array_equal(one, before[expected[0]])
        assert np.array_equal(other, before[expected[1]])


def main():
    assert config.ENABLE_CUDASIM
    kernels.THREADS = THREADS
    n = 0
    for dtype, average in fake_gpu.PAIRS:
        for mu, weight_decay, offsets in (
            (1.0, 0.0, (0, 0, 0)),
            (0.3, 0.1, (0, 0, 0)),
            (0.3, 0.1, (1, 2, 3)),
            (0.3, 0.0, (0, 0, 1)),
            (1.0, 0.1, (1, 1, 1)),
        ):
            check_update(dtype, average, offsets, mu, weight_decay)
            n += 1
    for averaging in ("mean", ("ema", 0.75), ("polynomial", 2)):
        check_device_scalars(averaging)
    for bits in ("bits16", "bits32", "bits64"):
        check_exchange(bits)
    print(f"{n + 4} launches simulated")


if __name__ == "__main__":
    main()
