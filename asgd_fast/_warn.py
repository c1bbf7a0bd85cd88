"""Warnings of the line that called this package. This module knows only frames."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn whoever called this package, from however deep inside of it, or from its contexts."""
    level, frame = 1, sys._getframe()
    while frame.f_back and _package_of(frame.f_globals) in ("asgd_fast", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, level)


def _package_of(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
