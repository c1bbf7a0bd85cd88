"""A launch through cuda.bindings and a stub of the driver (stub_driver.c): all but the device.

``LD_LIBRARY_PATH=<folder of the stub> python through_bindings.py``
"""

from __future__ import annotations

import ctypes
import os

import fake_gpu
import numpy as np

from asgd_fast import asgd_
from asgd_fast.cuda import build

KIND = build.Kind("update", "float32", "float32", False, 512)


class Elsewhere:
    """An array of a library that works on a stream of its own."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__array_interface__, "version": 3, "stream": 0x55}


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
    main()
