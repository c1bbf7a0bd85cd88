"""A launch through cuda.bindings and a stub of the driver (stub_driver.c): all but the device.

With ``cc -shared -fPIC -O2 -o build/libcuda.so.1 tests/stub_driver.c``, run
``LD_LIBRARY_PATH=build python tests/through_bindings.py``; with a number, as in
``tests/through_bindings.py 300``, it prints how long the host takes to launch for so many arrays.
"""

from __future__ import annotations

import ctypes
import os
import sys
from statistics import median
from timeit import repeat

import fake_gpu
import numpy as np

from asgd_fast import asgd_
from asgd_fast._engines import run_on_gpus
from asgd_fast._rows.rows import Rows
from asgd_fast.cuda import build
from asgd_fast.cuda.launches import UPDATE

KIND = build.Kind("update", "float32", "float32", False, 512)


class Elsewhere:
    """An array of a library that works on a stream of its own."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__array_interface__, "version": 3, "stream": 0x55}


def time_launches(n):
    """Print the median time of preparing and making a launch, by a driver that does nothing."""
    stub = ctypes.CDLL("libcuda.so.1")
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    stub.stub_set_launch.argtypes = [ctypes.c_void_p]
    stub.stub_set_launch(nothing)
    rows = Rows(("params[{}]", "grads[{}]", "axs[{}]"))
    arrays = [[fake_gpu.Array(np.zeros(64, np.float32)) for _ in range(n)] for _ in range(3)]
    rows.extend(*arrays, eta=0.1, mu=0.5)
    rows.check_overlap()
    times = repeat(lambda: run_on_gpus(rows, UPDATE), number=1000, repeat=15)
    print(f"{n} arrays: {median(times) * 1e3:.1f} us", flush=True)
    os._exit(0)


def main():
    stub = ctypes.CDLL("libcuda.so.1")
    launches = []

    @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p), *[ctypes.c_uint] * 2, ctypes.c_void_p)
    def launch(parameters, n_blocks, n_threads, stream):
        words = np.array((ctypes.c_uint64 * KIND.n_words).from_address(parameters[0]))
        launches.append((n_blocks, n_threads, stream))
        fake_gpu.body(KIND._replace(n_words=0))(words.ctypes.data, n_blocks)

    stub.stub_set_launch(launch)
    rng = np.random.default_rng(0)
    here = [rng.normal(size=20_000).astype(np.float32) for _ in range(3)]
    there = [x.copy() for x in here]
    for _ in range(3):
        asgd_(*here, eta=0.1, mu=0.3, weight_decay=0.1)
        asgd_(*map(fake_gpu.Array, there), eta=0.1, mu=0.3, weight_decay=0.1)
    assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
    assert launches == [(3, 512, 0x70)] * 3
    asgd_(*here, eta=0.1, mu=0.3)
    param, grad, ax = there
    asgd_(fake_gpu.Array(param), Elsewhere(grad), fake_gpu.Array(ax), eta=0.1, mu=0.3)
    assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
    waits = ((ctypes.c_void_p * 2) * 8)()
    assert stub.stub_waits(waits) == 2
    assert [list(pair) for pair in waits[:2]] == [[0x70, 0x55], [0x55, 0x70]]
    assert stub.stub_depth() == 0
    print("launched", flush=True)
    os._exit(0)  # what else uses the driver would miss what the stub has not


if __name__ == "__main__":
    if len(sys.argv) > 1:
        time_launches(int(sys.argv[1]))
    main()
