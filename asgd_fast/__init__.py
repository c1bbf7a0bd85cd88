"""asgd_fast: Averaged SGD in one in-place pass over NumPy, torch and any other DLPack arrays."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

try:
    from asgd_fast.arrays import ArrayASGD, asgd_
    from asgd_fast.schedule import AveragingNotBegunWarning, Schedule
    from asgd_fast.threads import get_num_threads, set_num_threads
    from asgd_fast.triggers import NonMonotonicTrigger
except ImportError as _error:
    if PathFinder.find_spec("asgd_fast._core", __path__) is not None:
        raise
    raise ImportError(
        f"asgd_fast was imported from {__path__[0]}, where its modules are not compiled for Python "
        f"{sys.version_info.major}.{sys.version_info.minor}. If this is a clone, and the installed "
        "package is wanted, start Python in another folder; to use the clone itself, run "
        "'python -m pip install --editable .' there"
    ) from _error

if TYPE_CHECKING:
    from asgd_fast.config import show_config
    from asgd_fast.optim import ASGD

    __version__: str

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

# `from asgd_fast import *` fails for a name that is not there, and whether torch has what ASGD
# needs is known when it was imported. So `__all__` is made when somebody asks for it.
_names = __all__
if not TYPE_CHECKING:
    del __all__

# Whether torch is installed, found out without importing it.
_has_torch = sys.modules["torch"] is not None if "torch" in sys.modules else find_spec("torch")


def _lazy(name: str) -> Any:
    """Import what takes long only when it is asked for."""
    if name == "ASGD":
        try:
            from asgd_fast.optim import ASGD
        except Exception as error:  # a stub of torch lacks anything
            # `from asgd_fast import ASGD` would put a message of its own in an AttributeError's
            # place; everybody else expects one: hasattr, inspect, mock.
            is_from_import = sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap"
            raise (ImportError if is_from_import else AttributeError)(
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
    if name == "__all__":
        return [name for name in _names if name != "ASGD" or _has_asgd()]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _has_asgd() -> bool:
    try:
        _lazy("ASGD")
    except AttributeError:
        return False
    return True


# Type checkers would take any name for one that is there.
if not TYPE_CHECKING:
    __getattr__ = _lazy


def __dir__() -> list[str]:
    names = {name for name in _names if name != "ASGD" or _has_torch}
    return sorted({*globals(), *names, "__all__", "__version__"})
