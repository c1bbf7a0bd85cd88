"""Launches on CUDA devices: the rows of a step become calls of the driver, one for each kind.

This module knows rows, words and streams; it does not know what kernels do, nor how they are
made. The driver is called directly: a launch by Numba takes 18 us.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from asgd_fast.cuda.build import Kind
from asgd_fast.cuda.device import checked, device_of, driver
from asgd_fast.cuda.launches import (
    ASSIGN,
    COPY_GRAD,
    KEEP,
    PUT_AVERAGE,
    PUT_BACK,
    SWAP,
    THREADS,
    UPDATE,
    keys_of,
    launch_kind,
    pack,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asgd_fast._rows.rows import Rows
    from asgd_fast.cuda.device import Device

__all__ = ["Launches", "prepared"]

# For how many words the kernels' parameters have room: enough for 124, 380 or 1,020 rows. The
# driver copies all of them at each launch, hence the second; the last is as many as CUDA allows
# since 12.1, the first as many as before.
SIZES = (512, 1536, 4095)
LARGE_SINCE = 12010

# So many blocks for each multiprocessor, which has two or three at once, make their ends fall
# together.
BLOCKS_PER_MULTIPROCESSOR = 32

# Refuses to let a step be part of a graph.
CAPTURED = (
    "the stream is being captured into a CUDA graph, in which eta and mu would stay what they are "
    "now; expected an optimizer with capturable=True"
)


class Words:
    """Room for the words of a launch, and what the driver is to know of it.

    Attributes
    ----------
    words : uint64 array of shape (4095,)
    parameters : int
        The address of the array of the kernel's parameters, which has one: the words.
    """

    def __init__(self) -> None:
        self.words: np.typing.NDArray[np.uint64] = np.zeros(SIZES[-1], dtype=np.uint64)
        self._parameters = np.array([self.words.ctypes.data], dtype=np.uint64)
        self.parameters: int = self._parameters.ctypes.data


# Between the steps they wait here. The driver copies them while it launches.
_spare_words: list[Words] = []


class Launches:
    """The launches of a step, ready to be made.

    Attributes
    ----------
    make : callable
        Makes them and returns what the driver has returned, for `finish`; the device works them off
        later. It does not run Python code, so that no interrupt comes between them.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[Callable[[], tuple[Any, ...]], ...]] = []
        self._words: list[Words] = []
        self.make: Callable[[], Any] = partial(run, self._groups, driver().CUresult.CUDA_SUCCESS)

    def add(self, device: Device, kind: Kind, n_blocks: int, stream: int, words: Words) -> None:
        """Add one launch.

        Parameters
        ----------
        device : Device
        kind : Kind
        n_blocks : int
        stream : int
        words : Words
            Given back after the launch.

        Raises
        ------
        ImportError, RuntimeError
            As `Device.function`.
        """
        grid = (n_blocks, 1, 1, THREADS, 1, 1, 0)
        launch = driver().cuLaunchKernel
        self._call(
            device, partial(launch, device.function(kind), *grid, stream, words.parameters, 0)
        )
        self._words.append(words)

    def let_wait(self, device: Device, stream: int, other: int) -> None:
        """Add that a stream waits for what another one has to do by then.

        Parameters
        ----------
        device : Device
        stream, other : int

        Raises
        ------
        RuntimeError
            The driver refuses.
        """
        call, event = driver(), device.event_of(other)
        self._call(
            device,
            partial(call.cuEventRecord, event, other),
            partial(call.cuStreamWaitEvent, stream, event, 0),
        )

    def wait(self, device: Device, stream: int) -> None:
        """Add that the host waits for a stream.

        Parameters
        ----------
        device : Device
        stream : int
        """
        self._call(device, partial(driver().cuStreamSynchronize, stream))

    def _call(self, device: Device, *calls: Callable[[], tuple[Any, ...]]) -> None:
        call = driver()
        push = partial(call.cuCtxPushCurrent, device.context)
        self._groups.append((push, *calls, call.cuCtxPopCurrent))

    def run(self) -> None:
        """Make the launches.

        Raises
        ------
        RuntimeError
            As `finish`.
        """
        self.finish(self.make())

    def finish(self, results: Iterable[tuple[Any, ...]]) -> None:
        """Check what `make` returned.

        Parameters
        ----------
        results : iterable of tuple

        Raises
        ------
        RuntimeError
            The driver has refused, or told of an error that the device has had before.
        """
        _spare_words.extend(self._words)
        for result in results:
            checked(result)


def prepared(rows: Rows, job: int, *, capturable: bool = False) -> Launches:
    """Prepare what is to be done to those rows of a step that are on CUDA devices.

    Parameters
    ----------
    rows : Rows
        Checked.
    job : int
        Of `asgd_fast.cuda.launches`.
    capturable : bool
        Whether updates may be captured into a graph, where the scalars are the device's. Those of
        the host would be frozen in it.

    Returns
    -------
    Launches

    Raises
    ------
    ImportError
        A package is missing.
    RuntimeError
        There is no driver; or the stream is being captured into a graph, and may not be.
    """
    launches = Launches()
    # Libraries that work on other streams have the arrays as their own work leaves them, and go on
    # when the step is through; for one whose stream is not known, the host waits for that.
    others = [
        (device_of(number), rows.streams[number], found) for number, found in rows.others.items()
    ]
    for device, stream, found in others:
        for other in found - {0}:
            if job == UPDATE and device.is_capturing(other):
                raise RuntimeError(CAPTURED)
            launches.let_wait(device, stream, other)
    for key in keys_of(rows):
        number, param, average, device_scalars = launch_kind(key)
        device = device_of(number)
        stream = rows.streams[number]
        is_captured = job == UPDATE and device.is_capturing(stream)
        if is_captured and not (device_scalars and capturable):
            raise RuntimeError(CAPTURED)
        room = SIZES[-1] if device.driver_version >= LARGE_SINCE else SIZES[0]
        enough = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR
        addresses = (0, 0)
        if device_scalars:
            own = rows.device_rows
            assert own is not None
            addresses = _address(own.loss_scale, number), _address(own.found_inf, number)
        for part in _parts(job, param != average):
            start = 0
            while start < len(rows):
                words = _words()
                start, n_blocks, n_words = pack(
                    rows, key, start, words.words[:room], part, enough, *addresses
                )
                if n_blocks == 0:
                    _spare_words.append(words)
                    continue
                sizes = SIZES[bisect_left(SIZES, n_words) :]
                kind = _kind(part, param, average, device_scalars, sizes[0])
                if is_captured and not device.has(kind):
                    # Rather a larger one that is there than one that is loaded in a capture.
                    larger = (_kind(part, param, average, device_scalars, size) for size in sizes)
                    kind = next(filter(device.has, larger), kind)
                launches.add(device, kind, n_blocks, stream, words)
    for device, stream, found in others:
        for other in found - {0}:
            launches.let_wait(device, other, stream)
        if 0 in found:
            launches.wait(device, stream)
    return launches


def _words() -> Words:
    try:
        return _spare_words.pop()
    except IndexError:
        return Words()


def _parts(job: int, is_wide: bool) -> tuple[int, ...]:
    """Return the launches that a job takes."""
    if job == PUT_AVERAGE:
        return (KEEP, ASSIGN) if is_wide else (SWAP,)
    if job == PUT_BACK:
        return (COPY_GRAD,) if is_wide else (SWAP,)
    return (job,)


@cache
def _kind(job: int, param: str, average: str, device_scalars: bool, n_words: int) -> Kind:
    if job == UPDATE:
        return Kind("update", param, average, device_scalars, n_words)
    if job == ASSIGN and param != average:
        return Kind("assign", param, average, False, n_words)
    bits = {"float16": "bits16", "bfloat16": "bits16", "float32": "bits32", "float64": "bits64"}
    return Kind("exchange", bits[param], bits[param], False, n_words)


def _address(tensors: dict[int, Any] | None, number: int) -> int:
    return 0 if tensors is None else tensors[number].data_ptr()
