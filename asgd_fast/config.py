"""What this installation is: versions, build, processor, and how it reaches other libraries.

This module knows where such facts stand; it decides nothing.
"""

from __future__ import annotations

import ctypes
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, overload

from asgd_fast import _core
from asgd_fast._rows import dlpack
from asgd_fast.threads import get_num_threads, openmp_runtime

__all__ = ["show_config"]

# The libraries whose arrays are looked at: the name to import, which all make arrays by `zeros`.
_LIBRARIES = {"numpy": "numpy", "torch": "torch", "cupy": "cupy", "jax": "jax.numpy"}


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, Any]]: ...
def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Show the versions, the build, the processor's use and the paths to other libraries.

    Libraries that are installed are imported to look at their arrays, torch among them.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default="stdout"
        Print the facts, or return them.

    Returns
    -------
    dict of str to dict, or None
        The facts in sections, plain enough for JSON.

    Raises
    ------
    ValueError
        `mode` is something else.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: got {mode!r}; expected 'stdout' or 'dicts'")
    # These imports come first: where torch is, its OpenMP runtime lends the threads.
    arrays = {name: _path_of(name) for name in _LIBRARIES}
    config: dict[str, dict[str, Any]] = {
        "versions": {
            "asgd_fast": _version("asgd_fast"),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": {
            "compiler": _core.BUILD["compiler"],
            "cython": _core.BUILD["cython"],
            "flags": _core.BUILD["flags"],
        },
        "cpu": {
            "machine": platform.machine(),
            "simd": _core.simd_level(),
            "simd available": _core.simd_levels(),
            "threads": get_num_threads(),
            "openmp": openmp_runtime(),
        },
        "arrays": arrays,
        "cuda": {
            "driver": _cuda_driver(),
            "numba": _version("numba"),
            "numba-cuda": _version("numba-cuda"),
        },
    }
    if mode == "dicts":
        return config
    for section, facts in config.items():
        print(f"{section}:")
        for name, value in facts.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {name}: {text}")
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _path_of(library: str) -> str:
    """Return the library's version, and the way its arrays are borrowed."""
    found = _version(library)
    if found == "not installed":
        return found
    try:
        zeros = import_module(_LIBRARIES[library]).zeros(1)
        return f"{found}, through its {dlpack.path_of(zeros)}"
    except Exception as error:  # whatever a broken installation raises is the finding
        return f"{found}, unusable: {type(error).__name__}: {error}"


def _cuda_driver() -> str:
    """Return the CUDA version that the installed driver supports."""
    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
        if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return "found, but does not answer"
    except (OSError, AttributeError):
        return "not found"
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
