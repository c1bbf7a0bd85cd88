"""How many threads a step may use, and the OpenMP runtime that lends them.

A process is to have one runtime: two would each keep threads that wait busily for work, and take
the processor from the other's. So none is linked: the one that torch uses is taken, else one that
is loaded already, else the system's. This module does not know what the threads do.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from asgd_fast import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asgd_fast._rows.rows import Rows

__all__ = ["get_num_threads", "is_forked", "openmp_runtime", "set_num_threads", "threads_for"]

# The functions that _core calls: GNU's, which LLVM's and Intel's runtimes have too.
FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num")

# The system's own, by the name under which the loader finds it.
SYSTEM_RUNTIMES = ("libgomp.so.1", "libomp.so.5", "libomp.dylib")

# By which users tell a runtime how its threads wait for work.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

# A thread more for so many bytes of params. Two threads gain from 768 KiB on even where one must be
# woken first; where both are awake, as beside large operations of torch, from 128 or 256 KiB on,
# but nobody can tell which it is (docs/performance.md).
BYTES_PER_THREAD = 384 << 10

# What set_num_threads was told, and the runtime's own number at that time.
_told: tuple[int, int] | None = None

_is_forked = False


def get_num_threads() -> int:
    """Return how many threads a large step uses.

    Returns
    -------
    int
        What `set_num_threads` was told, for as long as the OpenMP runtime keeps the number that it
        had then; else that number: of the environment variable OMP_NUM_THREADS, of
        ``threadpoolctl`` or of ``torch.set_num_threads``. 1 where there is no OpenMP runtime, and
        in a process that was forked, which cannot rely on its threads.
    """
    runtime = _runtime()
    if runtime is None or _is_forked:
        return 1
    own = runtime.number()
    return _told[0] if _told is not None and _told[1] == own else own


def set_num_threads(n: SupportsIndex) -> None:
    """Set how many threads a large step uses.

    torch and others that share the OpenMP runtime keep their number. Once that is another one, as
    in ``threadpoolctl.threadpool_limits`` or in a Python thread that has set its own, it holds here
    too.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        `n` is no integer.
    ValueError
        `n` is less than 1.
    """
    global _told
    try:
        number = index(n)
    except TypeError:
        raise TypeError(f"n: expected an integer, got {type(n).__name__}") from None
    if number < 1:
        raise ValueError(f"n: got {n}; expected at least 1")
    runtime = _runtime()
    _told = None if runtime is None else (number, runtime.number())


def threads_for(rows: Rows) -> int:
    """Return how many threads are worth waking for a step that has all its rows."""
    most = rows.cpu_bytes // BYTES_PER_THREAD
    return min(most, get_num_threads()) if most > 1 else 1


def is_forked() -> bool:
    """Return whether the process was forked, and cannot rely on threads of its parent."""
    return _is_forked


def openmp_runtime() -> str:
    """Return the file of the OpenMP runtime that lends the threads, or "not found".

    Returns
    -------
    str
    """
    runtime = _runtime()
    if runtime is None:
        return "not found"
    found = _DlInfo()
    ctypes.CDLL(None).dladdr(getattr(runtime.library, FUNCTIONS[0]), ctypes.byref(found))
    return os.fsdecode(found.file)


class _DlInfo(ctypes.Structure):
    """What the loader knows of an address: ``Dl_info`` of dlfcn.h."""

    file: bytes
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class _Runtime(NamedTuple):
    """An OpenMP runtime, and what tells its number of threads."""

    library: ctypes.CDLL
    number: Callable[[], int]


def _runtime() -> _Runtime | None:
    """Return the OpenMP runtime, which the engine then uses."""
    return _found(_torch() is not None)


# Looked for once, and once more when torch has come.
@lru_cache
def _found(has_torch: bool) -> _Runtime | None:
    torch = _torch() if has_torch else None
    for name in _candidates(torch):
        try:
            library = _loaded(name)
            functions = [getattr(library, function) for function in FUNCTIONS]
        except (OSError, AttributeError):
            continue
        fork, thread_number = (ctypes.cast(x, ctypes.c_void_p).value or 0 for x in functions)
        _core.use_runtime(fork, thread_number)
        # As torch tells it where torch is, whose first answer sets it.
        number = library.omp_get_max_threads if torch is None else torch.get_num_threads
        return _Runtime(library, number)
    return None


def _loaded(name: str) -> ctypes.CDLL:
    """Return a library, whose threads sleep between steps if it is an OpenMP runtime new here.

    A runtime reads the environment when it is loaded. Threads that wait busily, as they do by
    default, are in the way of the other libraries' that compute the gradients; and on a virtual
    machine it was measured that those which fall asleep after all take 7 ms to wake.
    """
    if any(variable in os.environ for variable in WAITING):
        return ctypes.CDLL(name)
    os.environ[WAITING[0]] = "passive"
    try:
        return ctypes.CDLL(name)
    finally:
        del os.environ[WAITING[0]]


def _candidates(torch: Any) -> Iterator[str]:
    """Yield the libraries to ask, the best first."""
    if torch is not None:
        # A library that is asked for a function asks those that it was linked with: torch's own.
        folder = Path(torch.__file__).parent / "lib"
        if folder.is_absolute():  # never what lies in the current directory
            yield from map(str, sorted(folder.glob("libtorch_cpu.*")))
    # Imported when it is needed: most steps of most programs are too small for threads.
    from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

    for library in threadpool_info():
        if library["user_api"] == "openmp":
            yield library["filepath"]
    yield from SYSTEM_RUNTIMES


def _torch() -> Any:
    """Return torch if the program has imported it, else None."""
    torch = sys.modules.get("torch")
    if not isinstance(getattr(torch, "__file__", None), str):  # a stub
        return None
    return torch if hasattr(torch, "get_num_threads") else None  # not while it is being imported


def _forget_threads() -> None:
    """Stay with one thread in a child process: the runtime would wait for threads it has not."""
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
