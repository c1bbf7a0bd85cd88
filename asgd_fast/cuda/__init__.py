"""The GPU engine: Numba kernels that update the rows of a step in the memory of CUDA devices.

It is imported when the first array of such a device comes.
"""

from __future__ import annotations

__all__ = ["MISSING"]

# What every error says that comes of a package which is not installed, or not in the right version.
MISSING = (
    "arrays in the memory of a CUDA device need the packages of the cuda extra; in a clone of "
    "asgd_fast: pip install '.[cuda]'"
)
