"""A stand-in for the CUDA driver, whose devices have the host's memory, and arrays that are there.

A launch decodes the parameters as a device would, and runs the kernel's body on the CPU.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import exporters
import numpy as np

from asgd_fast.cuda import build, device, intrinsics, kernels, launch, memory
from asgd_fast.cuda.launches import THREADS

SUCCESS = SimpleNamespace(name="CUDA_SUCCESS", value=0)
REFUSED = SimpleNamespace(name="CUDA_ERROR_LAUNCH_FAILED", value=719)


# The dtypes of params with those that their averages may have.
PAIRS = [
    ("float16", "float16"),
    ("float16", "float32"),
    ("float16", "float64"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "float64"),
    ("float32", "float32"),
    ("float32", "float64"),
    ("float64", "float64"),
]


@cache
def body(kind):
    """What a kernel does, compiled for the CPU; the same for all sizes of the parameters."""
    return kernels.twin(kind, intrinsics.make("cpu"))


class Driver:
    """The functions that are called of cuda.bindings.driver, over the host's memory.

    Attributes
    ----------
    launches : list of Launch
        Those made so far.
    captured : set of int
        The streams that are being captured.
    loaded : list of (context, Kind)
        The kernels, in order.
    copies : list of (int, int)
        The devices and streams of copies from or to the host.
    devices : dict of int to int
        Those of addresses that will be asked for.
    waits : list of int
        The streams that the host has waited for.
    order : list of tuple
        What concerns streams, as it came: ("launch", stream), ("host waits for", stream), and
        (stream, "waits for", other stream).
    n_events : int
        Those made so far.
    fails, is_old : bool
        Whether it refuses to launch, or to load, kernels.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
    )
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0)

    def __init__(self, n_devices=2, version=13000):
        self.n_devices, self.version = n_devices, version
        self.launches, self.contexts, self.captured, self.loaded = [], [], set(), []
        self.copies, self.waits, self.order = [], [], []
        self.n_events, self.recorded = 0, {}
        self.devices = {}
        self.fails = self.is_old = False

    def cuDeviceGet(self, number):
        return (SUCCESS, number) if number < self.n_devices else (REFUSED, None)

    def cuDevicePrimaryCtxRetain(self, device):
        return SUCCESS, ("context", device)

    def cuDeviceGetAttribute(self, attribute, device):
        return SUCCESS, {75: 9, 76: 0, 16: 132}[attribute]

    def cuDriverGetVersion(self):
        return SUCCESS, self.version

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (SUCCESS,)

    def cuCtxPopCurrent(self):
        return SUCCESS, self.contexts.pop()

    def cuPointerGetAttribute(self, attribute, address):
        return SUCCESS, {9: self.devices[address]}[attribute]

    def cuStreamIsCapturing(self, stream):
        return SUCCESS, int(stream in self.captured)

    def cuModuleLoadData(self, image):
        if self.is_old:
            return REFUSED, None
        kind = build.Kind(*eval(image))
        self.loaded.append((self.contexts[-1], kind))
        return SUCCESS, (self.contexts[-1], kind)

    def cuModuleGetFunction(self, module, name):
        assert name == b"kernel"
        return SUCCESS, module

    def cuLaunchKernel(self, function, *rest):
        n_blocks, y, z, n_threads, *others, shared, stream, parameters, extra = rest
        context, kind = function
        assert (y, z, *others, shared, extra) == (1, 1, 1, 1, 0, 0)
        assert n_threads == THREADS
        assert context == self.contexts[-1]
        if self.fails:
            return (REFUSED,)
        address = ctypes.c_uint64.from_address(parameters).value
        words = np.ctypeslib.as_array((ctypes.c_uint64 * kind.n_words).from_address(address)).copy()
        self.launches.append(Launch(context[1], kind, n_blocks, stream, words))
        self.order.append(("launch", stream))
        body(kind._replace(n_words=0))(words.ctypes.data, n_blocks)
        return (SUCCESS,)

    def cuEventCreate(self, flags):
        assert flags == 2
        self.n_events += 1
        return SUCCESS, (self.contexts[-1], self.n_events)

    def cuEventRecord(self, event, stream):
        assert event[0] == self.contexts[-1]
        self.recorded[event] = stream
        return (SUCCESS,)

    def cuStreamWaitEvent(self, stream, event, flags):
        assert (event[0], flags) == (self.contexts[-1], 0)
        self.order.append((stream, "waits for", self.recorded[event]))
        return (SUCCESS,)

    def cuMemcpyDtoHAsync(self, host, address, n_bytes, stream):
        self.copies.append((self.contexts[-1][1], stream))
        ctypes.memmove(host, address, n_bytes)
        return (SUCCESS,)

    def cuMemcpyHtoDAsync(self, address, host, n_bytes, stream):
        self.copies.append((self.contexts[-1][1], stream))
        ctypes.memmove(address, host, n_bytes)
        return (SUCCESS,)

    def cuStreamSynchronize(self, stream):
        self.waits.append(stream)
        self.order.append(("host waits for", stream))
        return (SUCCESS,)

    def cuGetErrorName(self, status):
        return SUCCESS, status.name.encode()

    def cuGetErrorString(self, status):
        return SUCCESS, b"unspecified launch failure"


class Launch(SimpleNamespace):
    """A launch as a device gets it."""

    def __init__(self, device, kind, n_blocks, stream, words):
        super().__init__(device=device, kind=kind, n_blocks=n_blocks, stream=stream, words=words)


@contextmanager
def installed(monkeypatch, **options):
    """Let launches go to a fake driver."""
    fake = Driver(**options)
    for module in (device, launch, memory):
        monkeypatch.setattr(module, "driver", lambda: fake)
    monkeypatch.setattr(
        device, "stored", lambda kind, _: build.Binary("kernel", repr(tuple(kind)).encode())
    )
    device.device_of.cache_clear()
    yield fake
    assert fake.contexts == []
    device.device_of.cache_clear()


# The current stream of each device, as the library of the arrays below has it.
streams = {0: 0x70, 1: 0x71}


class Array(exporters.Versioned):
    """An array on a device, of a library that knows the exchange API and streams."""

    __dlpack_c_exchange_api__ = exporters.exchange_api((1, 3), stream_of=lambda i: streams[i])

    def __init__(self, array, device=0, bfloat16=False, **options):
        super().__init__(array, device_type=exporters.CUDA, **options)
        self.device, self.bfloat16 = device, bfloat16

    def fill(self, tensor):
        buffers = super().fill(tensor)
        tensor.device.device_id = self.device
        if self.bfloat16:
            tensor.dtype.code = 4
        return buffers

    def __iadd__(self, other):
        return NotImplemented

    def copy(self, order="C"):
        return Array(self.array.copy(order), self.device, self.bfloat16)

    def astype(self, dtype, order="C"):
        assert not self.bfloat16
        return Array(self.array.astype(dtype, order), self.device)
