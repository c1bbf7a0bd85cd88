"""From a kernel's kind to a binary for a GPU, kept on disk for the next process.

This module knows compilers, versions and files; it does not know what kernels do. Numba is imported
only to compile: a process that finds its kernels on disk does without.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from asgd_fast.cuda import MISSING, launches

__all__ = ["Binary", "Kind", "compiled", "link", "ptx_of", "stored"]

# What a kernel's code follows from besides these files.
PACKAGES = (
    "cuda-bindings",
    "llvmlite",
    "numba",
    "numba-cuda",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink",
    "nvidia-nvjitlink-cu12",
    "nvidia-nvvm",
)
FILES = ("build.py", "intrinsics.py", "kernels.py", "recurrence.py")

# How many blocks of 512 threads share a multiprocessor: a thread has 40 or 64 registers then, which
# are enough to spill none. Half types take more, eight at a time; so do wide averages and scalars
# on the device.
BLOCKS_AT_ONCE = {False: 3, True: 2}


class Kind(NamedTuple):
    """Which of the kernels it is.

    Attributes
    ----------
    job : {"update", "exchange", "assign"}
        "exchange" swaps param and average, or copies the grad over the param; "assign" rounds the
        average into the param.
    param, average : str
        Their dtypes: "float16", "bfloat16", "float32" or "float64"; to exchange them "bits16",
        "bits32" or "bits64" twice.
    device_scalars : bool
        Whether step, eta and mu of each row are in the GPU's memory, where the update advances
        them; else their values come with the launch.
    n_words : int
        For how many words a launch has room.
    """

    job: str
    param: str
    average: str
    device_scalars: bool
    n_words: int


class Binary(NamedTuple):
    """A kernel that a driver can load.

    Attributes
    ----------
    entry : str
        Its name.
    cubin : bytes
    """

    entry: str
    cubin: bytes


def stored(kind: Kind, compute_capability: tuple[int, int]) -> Binary:
    """Return a kernel from disk, or compile it and leave it there.

    Parameters
    ----------
    kind : Kind
    compute_capability : tuple of int
        Of the GPU.

    Returns
    -------
    Binary

    Raises
    ------
    ImportError
        It must be compiled, and a package is missing for that.
    RuntimeError
        It cannot be compiled for that GPU.
    """
    folder = _folder()
    if folder is None:
        return compiled(kind, compute_capability)
    path = folder / f"{_digest(kind, compute_capability)}.cubin"
    found = _read(path)
    if found is None:
        found = compiled(kind, compute_capability)
        _write(path, found)
    return found


def compiled(kind: Kind, compute_capability: tuple[int, int]) -> Binary:
    """Compile a kernel; no GPU is needed.

    Parameters
    ----------
    kind : Kind
    compute_capability : tuple of int

    Returns
    -------
    Binary

    Raises
    ------
    ImportError, RuntimeError
        As `stored`.
    """
    ptx = ptx_of(kind, compute_capability)
    entry = re.search(r"\.visible \.entry (\S+)\(", ptx)
    assert entry is not None
    return Binary(entry[1], link(ptx, compute_capability)[0])


def ptx_of(kind: Kind, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel to PTX.

    Parameters
    ----------
    kind : Kind
    compute_capability : tuple of int

    Returns
    -------
    str
        In the version of the installed compiler, which the driver may be too old for: see `link`.

    Raises
    ------
    ImportError, RuntimeError
        As `stored`.
    """
    try:
        from numba import cuda, types

        if cuda.implementation != "NVIDIA":  # but Numba's own, which is older
            raise ImportError("numba-cuda is not installed")
        from asgd_fast.cuda.intrinsics import Words, make
        from asgd_fast.cuda.kernels import kernel
    except Exception as error:  # of any kind, where versions do not go together
        raise ImportError(f"{MISSING} ({type(error).__name__}: {error})") from error
    if cuda.compile is None:
        raise RuntimeError(
            "Numba simulates GPUs, as NUMBA_ENABLE_CUDASIM asks, and compiles nothing"
        )
    is_half = kind.param in ("float16", "bfloat16")
    takes_many = is_half or kind.device_scalars or kind.param != kind.average
    try:
        ptx, _ = cuda.compile(
            kernel(kind, make("cuda", compute_capability)),
            types.void(Words(kind.n_words)),
            device=False,
            abi="numba",
            cc=compute_capability,
            launch_bounds=(launches.THREADS, BLOCKS_AT_ONCE[takes_many]),
            # Whatever the environment asks of Numba: what is kept on disk is for all processes.
            debug=False,
            opt=True,
        )
    except Exception as error:  # of any kind: libraries are looked for as they are needed
        raise _not_made("Numba", compute_capability, error) from error
    assert isinstance(ptx, str)
    return ptx


def _not_made(tool: str, compute_capability: tuple[int, int], reason: object) -> RuntimeError:
    major, minor = compute_capability
    return RuntimeError(
        f"{tool} made no kernel for compute capability {major}.{minor}: {reason}; the compiler and "
        "its linker come with 'numba-cuda[cu13]', or cu12, and need a Numba and a NumPy that go "
        "together with it, as those of the extra 'cuda' do"
    )


def link(ptx: str, compute_capability: tuple[int, int]) -> tuple[bytes, str]:
    """Make a binary of PTX by the compiler's own linker, which a driver may be older than.

    Parameters
    ----------
    ptx : str
    compute_capability : tuple of int

    Returns
    -------
    cubin : bytes
    report : str
        What the linker says of registers, stack and spills.

    Raises
    ------
    RuntimeError
        The linker refuses, as it does for a GPU that it does not know.
    """
    from cuda.bindings import nvjitlink

    major, minor = compute_capability
    options = [f"-arch=sm_{major}{minor}", "-O3", "-verbose"]
    handle = None
    try:
        handle = nvjitlink.create(len(options), options)
        data = ptx.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "asgd_fast")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        report = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, report)
    except Exception as error:  # of any kind, where the library is not found
        log = bytearray(nvjitlink.get_error_log_size(handle) if handle is not None else 0)
        if log:
            nvjitlink.get_error_log(handle, log)
        reason = log.decode(errors="replace").strip("\0\n ") or error
        raise _not_made("nvJitLink", compute_capability, reason) from error
    finally:
        if handle is not None:
            nvjitlink.destroy(handle)
    return bytes(cubin), report.decode(errors="replace")


def _folder() -> Path | None:
    """Return the folder of the kernels; None if there can be none that only this user writes to."""
    folder = user_cache_path("asgd_fast") / "cuda"
    if not folder.is_absolute():  # of nobody's home: where the process happens to be
        return None
    try:
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder.stat()):
            return folder
    except OSError:
        return None
    _warn(folder, "others may write to it; expected a folder of this user, of mode 0700")
    return None


def _is_ours(status: os.stat_result) -> bool:
    """Return whether a file or a folder is of this user, and nobody else may write to it."""
    if not hasattr(os, "geteuid"):  # Windows, where the folder is in the user's profile
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _warn(path: Path, reason: str) -> None:
    message = f"kernels are compiled anew and not taken from {path}: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _digest(kind: Kind, compute_capability: tuple[int, int]) -> str:
    """Return a name for everything that the code of a kernel follows from."""
    here = Path(__file__).parent
    layout = {name: x for name, x in vars(launches).items() if isinstance(x, int)}
    parts = [*kind, compute_capability, sorted(layout.items()), *map(_version, PACKAGES)]
    digest = hashlib.sha256(repr(parts).encode())
    for name in FILES:
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _opened(path: str, flags: int) -> int:
    """Open a file that may be anything: no link is followed, and no writer to a FIFO waited for."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


# A file is the digest of all that follows, the entry's name in a line of its own, and the cubin.
def _read(path: Path) -> Binary | None:
    """Return the kernel in a file; None if there is none, or with a warning if it is not ours."""
    try:
        with open(path, "rb", opener=_opened) as stream:
            status = os.fstat(stream.fileno())
            if not (stat.S_ISREG(status.st_mode) and _is_ours(status)):
                _warn(path, "expected a regular file of this user, to which nobody else may write")
                return None
            data = stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(path, str(error.strerror))
        return None
    digest, rest = data[:32], data[32:]
    entry, _, cubin = rest.partition(b"\n")
    if hashlib.sha256(rest).digest() != digest or not entry.isascii():
        _warn(path, "the file is damaged")
        return None
    return Binary(entry.decode(), cubin)


def _write(path: Path, binary: Binary) -> None:
    """Leave a kernel in a file, if that is allowed; whoever reads it finds all or nothing."""
    rest = binary.entry.encode() + b"\n" + binary.cubin
    with suppress(OSError):
        file, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(file, "wb") as stream:
                stream.write(hashlib.sha256(rest).digest() + rest)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
