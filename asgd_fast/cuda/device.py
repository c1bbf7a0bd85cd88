"""CUDA devices: the driver, contexts, and the kernels that were loaded.

This module knows the driver; it does not know what is launched, nor how kernels are made.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache, lru_cache
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

from asgd_fast.cuda import MISSING
from asgd_fast.cuda.build import stored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asgd_fast.cuda.build import Binary, Kind

__all__ = ["Device", "checked", "device_of", "driver", "number_of"]


# The default stream of a thread, by the same number in each.
PER_THREAD_STREAM = 2


@lru_cache
def driver() -> Any:
    """Return the driver's functions.

    Returns
    -------
    module
        ``cuda.bindings.driver``, initialised.

    Raises
    ------
    ImportError
        The package is not installed.
    RuntimeError
        There is no driver, or it has no device.
    """
    try:
        from cuda.bindings import driver as functions
    except ImportError as error:
        raise ImportError(MISSING) from error
    try:
        (status,) = functions.cuInit(0)
    except Exception as error:  # of whatever kind: the library was not found
        raise RuntimeError(f"the CUDA driver was not found: {error}") from error
    if status != functions.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver does not work: cuInit returned {status.name}")
    return functions


class Device:
    """A CUDA device, by its number, with the kernels that were loaded there.

    Attributes
    ----------
    context : CUcontext
        The one that all libraries share.
    compute_capability : tuple of int
    multiprocessors : int
    driver_version : int
        13000 for CUDA 13.0.
    """

    def __init__(self, number: int) -> None:
        call = driver()
        attribute = call.CUdevice_attribute
        device = checked(call.cuDeviceGet(number))
        self.context: Any = checked(call.cuDevicePrimaryCtxRetain(device))
        major, minor, n = (
            checked(call.cuDeviceGetAttribute(name, device))
            for name in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self.compute_capability: tuple[int, int] = (major, minor)
        self.multiprocessors: int = n
        self.driver_version: int = checked(call.cuDriverGetVersion())
        self._functions: dict[Kind, Any] = {}
        self._lock = Lock()
        self._events: dict[tuple[int, int], Any] = {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context this thread's current one for as long as the context lasts."""
        call = driver()
        checked(call.cuCtxPushCurrent(self.context))
        try:
            yield
        finally:
            call.cuCtxPopCurrent()

    def function(self, kind: Kind) -> Any:
        """Return a kernel, loaded.

        Parameters
        ----------
        kind : Kind

        Returns
        -------
        CUfunction

        Raises
        ------
        ImportError, RuntimeError
            It cannot be compiled or loaded.
        """
        try:
            return self._functions[kind]
        except KeyError:
            pass
        with self._lock:
            if kind not in self._functions:
                self._functions[kind] = self._loaded(stored(kind, self.compute_capability))
        return self._functions[kind]

    def has(self, kind: Kind) -> bool:
        """Return whether a kernel is loaded.

        Parameters
        ----------
        kind : Kind

        Returns
        -------
        bool
        """
        return kind in self._functions

    def _loaded(self, binary: Binary) -> Any:
        """Load a kernel for good: a captured graph may still launch it."""
        call = driver()
        with self.current():
            try:
                module = checked(call.cuModuleLoadData(binary.cubin))
            except RuntimeError as error:
                major, minor = self.driver_version // 1000, self.driver_version % 1000 // 10
                raise RuntimeError(
                    f"{error}: the driver, of CUDA {major}.{minor}, did not load a kernel; if the "
                    "installed CUDA packages are of a later CUDA, install those of its own, such "
                    f"as 'numba-cuda[cu{major}]'"
                ) from error
            return checked(call.cuModuleGetFunction(module, binary.entry.encode()))

    def event_of(self, stream: int) -> Any:
        """Return the event by which other streams wait for a stream.

        Threads share the event of a stream. Where one of them records it again before another one
        has waited for it, the latter waits for a later point of that stream, which is right too.
        The per-thread default stream has an event for each thread, since it is another stream in
        each.

        Parameters
        ----------
        stream : int

        Returns
        -------
        CUevent

        Raises
        ------
        RuntimeError
            The driver refuses.
        """
        key = stream, get_ident() if stream == PER_THREAD_STREAM else 0
        event = self._events.get(key)
        if event is None:
            call = driver()
            with self.current():
                event = checked(call.cuEventCreate(call.CUevent_flags.CU_EVENT_DISABLE_TIMING))
            self._events[key] = event
        return event

    def is_capturing(self, stream: int) -> bool:
        """Return whether a stream is being captured into a graph.

        Parameters
        ----------
        stream : int

        Returns
        -------
        bool

        Raises
        ------
        RuntimeError
            The driver refuses.
        """
        call = driver()
        checked(call.cuCtxPushCurrent(self.context))
        try:  # as `current`, which takes a microsecond more
            result = call.cuStreamIsCapturing(stream)
        finally:
            call.cuCtxPopCurrent()
        none = call.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        return bool(checked(result) != none)


@cache
def device_of(number: int) -> Device:
    """Return a device by its number; the same each time."""
    return Device(number)


def number_of(address: int) -> int:
    """Return the number of the device that has some memory.

    Parameters
    ----------
    address : int
        0 if there is none.

    Returns
    -------
    int

    Raises
    ------
    ImportError, RuntimeError
        As `driver`; or no device has it.
    """
    if address == 0:
        return 0
    call = driver()
    ordinal = call.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(checked(call.cuPointerGetAttribute(ordinal, address)))


def checked(result: tuple[Any, ...]) -> Any:
    """Return what a function of the driver returned beside its status.

    Parameters
    ----------
    result : tuple
        That begins with the status.

    Returns
    -------
    object

    Raises
    ------
    RuntimeError
        The status is not that of success.
    """
    call = driver()
    if result[0] != call.CUresult.CUDA_SUCCESS:
        _, name = call.cuGetErrorName(result[0])
        _, text = call.cuGetErrorString(result[0])
        raise RuntimeError(f"CUDA: {_text(text)} ({_text(name)})")
    return result[1] if len(result) > 1 else None


def _text(message: bytes | None) -> str:
    return (message or b"unknown error").decode()
