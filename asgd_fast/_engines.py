"""From arrays to the engine that has their memory: updates, exchanges and copies.

This module knows sequences of arrays and which engine takes them; it does not know groups,
schedules or how the pass is made.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from asgd_fast import _core
from asgd_fast._rows.rows import Rows, dtype_of, is_array, whereabouts_of
from asgd_fast.cuda.launches import ASSIGN, COPY_GRAD, PUT_AVERAGE, PUT_BACK, UPDATE
from asgd_fast.threads import threads_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    import numpy.typing as npt

    from asgd_fast.cuda.launch import Launches

# A param, what keeps it meanwhile unless the average can, and the average.
Exchange: TypeAlias = tuple[Any, Any, Any]


def as_arrays(name: str, arrays: Any) -> list[Any]:
    """Return one array, or an iterable of arrays, as a new list; `name` is for messages.

    A set or mapping is refused, as it has no order to rely on; and an array that does not lend its
    memory, for its elements may be copies. The elements are not looked at.
    """
    if is_array(arrays) or isinstance(arrays, np.generic):
        return [arrays]
    if type(arrays) is list or type(arrays) is tuple:
        return list(arrays)
    if any(
        hasattr(arrays, attribute)
        for attribute in ("shape", "dtype", "__array__", "__array_interface__")
    ):
        raise TypeError(
            f"{name}: {type(arrays).__name__} does not lend its memory through DLPack; expected an "
            "array of a library that speaks DLPack, such as NumPy, torch or CuPy, or a sequence of "
            "such arrays"
        )
    try:
        if isinstance(arrays, (str, bytes, set, frozenset)) or hasattr(arrays, "keys"):
            raise TypeError
        elements = iter(arrays)
    except TypeError:
        raise TypeError(
            f"{name}: expected an array or a sequence of arrays, got {type(arrays).__name__}"
        ) from None
    return list(elements)


def template(name: str, arrays: Any) -> str:
    """Return what messages call the i-th array of an argument, as a format string of i."""
    return name if is_array(arrays) else f"{name}[{{}}]"


def update(rows: Rows) -> None:
    """Make the step that the rows list, each with a grad, in place.

    Where two arrays share memory, and one of them is written, it raises ValueError and changes
    nothing.
    """
    rows.check_overlap()
    run_on_gpus(rows, UPDATE)
    _core.update(rows, threads_for(rows))


def refuse_recording(call: str) -> None:
    """Refuse a call, by its name, that would be missing from what torch is recording."""
    torch = sys.modules.get("torch")
    recorder = None if torch is None else _finder_of_recorders(torch)()
    if recorder is not None:
        raise RuntimeError(
            f"{call}: {recorder} records torch's own operations alone, so that it would be missing"
        )


@cache
def _finder_of_recorders(_torch: ModuleType) -> Callable[[], str | None]:
    """Return what finds out whether torch is recording; a stub of torch never does."""
    try:
        from asgd_fast._torch.internals import recorder
    except (ImportError, AttributeError):
        return lambda: None
    return recorder


def launches_for(rows: Rows, job: int = UPDATE, *, capturable: bool = False) -> Launches | None:
    """Prepare what is to be done to checked rows in the memory of CUDA devices, if there are any.

    `job` is one of `asgd_fast.cuda.launches`. With `capturable`, steps with scalars on the device
    may be captured into a graph. It raises ImportError if a package is missing that such rows need,
    and RuntimeError if there is no driver, or the stream is being captured into a graph.
    """
    if not rows.has_gpu_rows:
        return None
    return _prepared()(rows, job, capturable=capturable)


@cache
def _prepared() -> Callable[..., Launches]:
    """Return what prepares launches, imported when the first array on a device comes."""
    from asgd_fast.cuda import MISSING

    try:
        from asgd_fast.cuda.launch import prepared
    except ImportError as error:
        raise ImportError(MISSING) from error
    return prepared


def run_on_gpus(rows: Rows, job: int) -> None:
    """Do to checked rows in the memory of CUDA devices what is to be done there.

    It raises what `launches_for` does; and RuntimeError where the device has failed.
    """
    launches = launches_for(rows, job)
    if launches is not None:
        launches.run()


def copy(rows: Rows) -> None:
    """Copy each grad of the rows over its param, in place; raises as `update`."""
    rows.check_overlap()
    run_on_gpus(rows, COPY_GRAD)
    _core.copy(rows)


def assign(rows: Rows) -> None:
    """Make each param of the rows its average, rounded where that is wider; raises as `update`."""
    rows.check_overlap()
    run_on_gpus(rows, ASSIGN)
    _core.assign(rows, threads_for(rows))


def to_host(array: Any) -> npt.NDArray[Any]:
    """Return a copy of a dense array as a NumPy array of the same layout.

    It raises TypeError if NumPy does not have the dtype (bfloat16), and RuntimeError if the array
    is on a CUDA device that does not work.
    """
    address, device, stream, shape, strides = whereabouts_of(array)
    if device is None:
        copied: npt.NDArray[Any] = np.from_dlpack(array).copy(order="K")
        return copied
    from asgd_fast.cuda import memory

    dtype = np.dtype(dtype_of(array))
    host = np.empty(math.prod(shape), dtype)
    memory.to_host(host, address, device, stream)
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(host, shape, in_bytes)


def is_on_gpu(array: Any) -> bool:
    """Whether an array is in the memory of a CUDA device."""
    return whereabouts_of(array)[1] is not None


def from_host(array: Any, source: npt.NDArray[Any]) -> None:
    """Copy what `to_host` has made over an array of the same layout and dtype on a CUDA device.

    It raises RuntimeError where the device does not work.
    """
    from asgd_fast.cuda import memory

    address, device, stream, _, _ = whereabouts_of(array)
    assert device is not None
    memory.from_host(source, address, device, stream)


@contextmanager
def exchanged(rows: Rows, list_again: Callable[[], Rows]) -> Iterator[None]:
    """Hold averages in their params for as long as the context lasts.

    On the way out everything gets its bits back. What was written in the params meanwhile is lost,
    or stays in the averages.

    Parameters
    ----------
    rows : Rows
        Each of a param, spare memory in its dtype if the average is wider, and its average.
        Checked.
    list_again : callable
        Lists the same arrays for the way out, wherever their memory then is.
    """
    refuse_recording("averaged_parameters")
    is_done = bytearray(1)
    try:
        _exchange(rows, is_done)
        yield
    finally:
        try:
            if is_done[0]:
                _exchange(list_again(), is_done)
        finally:
            if is_done[0]:  # interrupted, as people do who press Ctrl-C once more
                _exchange(list_again(), is_done)


def _exchange(rows: Rows, is_done: bytearray) -> None:
    launches = launches_for(rows, PUT_BACK if is_done[0] else PUT_AVERAGE)
    others = None if launches is None else launches.make
    results = _core.exchange(rows, is_done, threads_for(rows), others)
    if launches is not None:
        launches.finish(results)
    rows.clear()  # which give back what they borrowed


def rows_to_exchange(arrays: Sequence[Exchange]) -> Rows:
    """List arrays for `exchanged`, checked; raises as `Rows.extend` and `Rows.check_overlap`."""
    rows = Rows(("params[{}]", "spare memory[{}]", "averages[{}]"))
    first = 0
    for has_spare, run in groupby(arrays, lambda exchange: exchange[1] is not None):
        params, spares, axs = map(list, zip(*run, strict=True))
        rows.extend(params, spares if has_spare else None, axs, first=first)
        first += len(params)
    rows.check_overlap()
    return rows
