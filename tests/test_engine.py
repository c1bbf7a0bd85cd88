"""The parallel driver and its loops: the bits of torch for every level, size, dtype and split."""

from __future__ import annotations

import threading
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_fast import _core, asgd_, threads
from asgd_fast._rows.rows import Rows

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WIDTHS = (4, 8, 16, 32)  # of vectors, in elements
SIZES = sorted({0, 1, *(k * w + d for w in WIDTHS for k in (1, 5) for d in (-1, 0, 1))})
AVERAGES = {"none": None, "copied": 1.0, "averaged": 0.3}
SCALARS = {"eta": 0.25, "lambd": 0.5, "weight_decay": 0.125}


@pytest.fixture
def runtime():
    """An OpenMP runtime, so that the engine does use threads."""
    assert threads.openmp_runtime() != "not found"


def shifted(generator, n, dtype, shift):
    """Random numbers in the midst of others, `shift` elements past a multiple of 128 bytes."""
    base = torch.randn(n + 256, generator=generator, dtype=torch.float64).to(dtype)
    shift += -(base.data_ptr() // base.itemsize) % (128 // base.itemsize)
    return base, slice(shift, shift + n)


def expected(p, g, ax, mu):
    """The contract in torch's operations; half types through float32, rounded once."""
    dtype = p.dtype
    if dtype.itemsize == 2:
        p, g = p.float(), g.float()
        ax = None if ax is None else ax.float()
    g = g.add(p, alpha=SCALARS["weight_decay"])
    decay = 1 - SCALARS["lambd"] * SCALARS["eta"]
    p = p.mul(decay).add_(g, alpha=-SCALARS["eta"])
    if mu is not None:
        ax = p.clone() if mu == 1 else ax.add(p.sub(ax).mul(mu))
    return p.to(dtype), None if ax is None else ax.to(dtype)


def update(params, grads, axs, mu, n_threads):
    table = Rows(("params[{}]", "grads[{}]", "axs[{}]"))
    table.extend(params, grads, axs, mu=1.0 if mu is None else mu, **SCALARS)
    table.check_overlap()
    _core.update(table, n_threads)


@pytest.mark.parametrize("mu", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_size_and_alignment(simd_level, dtype, mu):
    generator = torch.Generator().manual_seed(0)
    for n, shifts in product(SIZES, ((0, 0, 0), (1, 2, 3), (5, 0, 31))):
        arrays = [shifted(generator, n, dtype, shift) for shift in shifts]
        wholes = [base.clone() for base, _ in arrays]
        p, g, ax = (base[part] for base, part in arrays)
        wanted = expected(p, g, None if mu is None else ax, mu)
        asgd_(p, g, None if mu is None else ax, mu=mu or 1.0, **SCALARS)
        for (base, part), whole, result in zip(
            arrays, wholes, (wanted[0], g, wanted[1]), strict=True
        ):
            if result is not None:
                whole[part] = result
            assert torch.equal(base, whole), (n, shifts)  # what lies around is untouched, too


def mixture(generator):
    """Arrays of all dtypes and of sizes far apart, some empty, as params, grads and averages."""
    sizes = (3, 0, 1, 200_003, 64, 16, 0, 5000, *range(40), 7)
    return [
        [
            torch.randn(n, generator=generator).to(DTYPES[i % len(DTYPES)])
            for i, n in enumerate(sizes)
        ]
        for _ in range(3)
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("mu", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_any_number_of_threads(runtime, n_threads, mu):
    params, grads, axs = mixture(torch.Generator().manual_seed(0))
    wanted = [
        expected(p, g, None if mu is None else ax, mu)
        for p, g, ax in zip(params, grads, axs, strict=True)
    ]
    update(params, grads, None if mu is None else axs, mu, n_threads)
    for p, ax, (wanted_p, wanted_ax) in zip(params, axs, wanted, strict=True):
        assert torch.equal(p, wanted_p)
        assert wanted_ax is None or torch.equal(ax, wanted_ax)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 1000])
def test_more_threads_than_cache_lines(runtime, n):
    generator = torch.Generator().manual_seed(n)
    p, g = torch.randn(2, n, generator=generator)
    wanted, _ = expected(p, g, None, None)
    update([p], [g], None, None, 50)
    assert torch.equal(p, wanted)


@pytest.mark.heavy
def test_all_threads_compute_as_the_caller_does(runtime):
    """Where the caller flushes subnormal numbers, so do they."""
    tiny = torch.full((1 << 20,), 1e-40)
    grads = torch.zeros_like(tiny)
    torch.set_flush_denormal(True)
    try:
        flushed = tiny.clone()
        asgd_(flushed, grads, eta=0.5, lambd=0.0)
        together = tiny.clone()
        for _ in range(20):
            together.copy_(tiny)
            update([together], [grads], None, None, 4)
            zeros = together.view(torch.int32) == 0
            assert zeros.all() or not zeros.any()
            assert bool(zeros[0]) == bool((flushed.view(torch.int32) == 0)[0])
    finally:
        torch.set_flush_denormal(False)
    update([tiny], [grads], None, None, 4)
    assert (tiny != 0).all()


@pytest.mark.heavy
def test_several_python_threads_at_once(runtime):
    results = {}

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        p, g, ax = torch.randn(3, 300_000, generator=generator)
        wanted = p.clone(), ax.clone()
        for _ in range(20):
            wanted = expected(wanted[0], g, wanted[1], 0.3)
            update([p], [g], [ax], 0.3, 3)
        results[seed] = torch.equal(p, wanted[0]) and torch.equal(ax, wanted[1])

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == dict.fromkeys(range(4), True)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_array_is_shared_by_all_threads(dtype):
    """Large enough that the defaults choose several threads."""
    p, g, ax = (torch.randn(1 << 24, dtype=torch.float32).to(dtype) for _ in range(3))
    wanted, _ = expected(p, g, ax, 1.0)
    asgd_(p, g, ax, mu=1.0, **SCALARS)
    assert torch.equal(p, wanted)
    assert torch.equal(ax, wanted)


def test_numpy_arrays_are_read_through_their_own_interface():
    """Plain ones; all others through capsules, with the same result."""
    rng = np.random.default_rng(0)
    for order in "CF":
        for dtype in (np.float16, np.float32, np.float64, np.complex64, np.complex128):
            p, g = (np.array(rng.standard_normal((3, 4)), dtype, order=order) for _ in range(2))
            wanted, _ = expected(torch.tensor(p), torch.tensor(g), None, None)
            asgd_(p, g, **SCALARS)
            assert np.array_equal(p, wanted.numpy())


@settings(deadline=None)
@given(data=st.data())
def test_rows_touch_what_shares_a_byte_with_them(data):
    """Against each pair by itself; arrays outside may overlap, and be none."""
    memory = np.zeros(64, np.uint8)
    places = data.draw(st.lists(st.integers(0, 14), max_size=6, unique=True), "places")
    rows = Rows(("params[{}]", "grads[{}]", "axs[{}]"))
    arrays = [memory[4 * i : 4 * i + 4].view(np.float32) for i in places]
    rows.extend(arrays, [np.zeros(1, np.float32) for _ in arrays])
    spans = st.tuples(st.integers(0, 63), st.integers(0, 20))
    start = memory.ctypes.data
    others = [
        (start + first, start + min(first + n, 64))
        for first, n in data.draw(st.lists(spans, max_size=6), "others")
    ]
    shared = [
        (i, first, stop)
        for i in places
        for first, stop in others
        if set(range(start + 4 * i, start + 4 * i + 4)) & set(range(first, stop))
    ]
    assert rows.touches([*others, (0, 0)]) == bool(shared)
