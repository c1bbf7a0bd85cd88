"""asgd_fast: Averaged SGD in one in-place pass over NumPy, torch and any other DLPack arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asgd_fast.arrays import ArrayASGD, asgd_
from asgd_fast.schedule import AveragingNotBegunWarning, Schedule
from asgd_fast.threads import get_num_threads, set_num_threads
from asgd_fast.triggers import NonMonotonicTrigger

if TYPE_CHECKING:
    from asgd_fast.config import show_config
    from asgd_fast.optim import ASGD

__all__ = [
    "ASGD",
    "ArrayASGD",
    "AveragingNotBegunWarning",
    "NonMonotonicTrigger",
    "Schedule",
    "asgd_",
    "get_num_threads",
    "set_num_threads",
    "show_config",
]


def __getattr__(name: str) -> Any:
    if name == "ASGD":
        try:
            from asgd_fast.optim import ASGD
        except ModuleNotFoundError as error:
            raise ImportError(
                "asgd_fast.ASGD needs torch, 2.4 or newer, which could not be imported; "
                "asgd_fast.ArrayASGD does without"
            ) from error
        return ASGD
    # What reads the installation's metadata takes three times as long as all the rest.
    if name == "show_config":
        from asgd_fast.config import show_config

        return show_config
    if name == "__version__":
        from importlib.metadata import version

        return version("asgd_fast")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "ASGD", "__version__", "show_config"])
