"""A program of a user, which no one runs: mypy looks at it, in `make lint`.

An error that mypy must find is one that it must be told to ignore.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import asgd_fast
from asgd_fast import ArrayASGD, NonMonotonicTrigger

if TYPE_CHECKING:
    from asgd_fast import ASDG  # type: ignore[attr-defined]  # noqa: F401


def main(file: str) -> None:
    optimizer = ArrayASGD([np.zeros(3)], lr=0.1)
    np.savez(file, **optimizer.state_dict())
    ArrayASGD([np.zeros(3)], averaging=("ema", 0.999))
    ArrayASGD([np.zeros(3)], averaging=("ema", "0.999"))  # type: ignore[arg-type]
    trigger = NonMonotonicTrigger(optimizer)
    for loss in (1, 1.0, np.float32(1), np.ones(1)):
        trigger.step(loss)
    trigger.step("1.0")  # type: ignore[arg-type]
    asgd_fast.ASDG  # type: ignore[attr-defined]  # noqa: B018
    asgd_fast.__version__.upper()
