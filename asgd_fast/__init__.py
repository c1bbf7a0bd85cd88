"""asgd_fast: Averaged SGD in one in-place pass over NumPy, torch and any other DLPack arrays."""

from __future__ import annotations

from asgd_fast.arrays import ArrayASGD, asgd_
from asgd_fast.config import show_config
from asgd_fast.schedule import Schedule

__all__ = ["ArrayASGD", "Schedule", "asgd_", "show_config"]


def __getattr__(name: str) -> str:
    # Reading the installed metadata takes longer than the rest of the import.
    if name == "__version__":
        from importlib.metadata import version

        return version("asgd_fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
