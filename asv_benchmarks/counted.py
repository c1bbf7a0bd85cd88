"""Updates whose instructions callgrind counts; prints the name of each, a tab, and its size.

    valgrind --tool=callgrind ... python -I counted.py {loops,rows} [times]

Without torch, under which valgrind would take minutes. See benchmarks/instructions.py. Many times
make each update last, for profilers that take samples.
"""

from __future__ import annotations

import sys

import numpy as np

from asgd_fast import asgd_

# Enough for what a call costs apart from its elements not to show.
N_ELEMENTS = 1 << 16

N_ARRAYS = 1000


def loops(times: int) -> None:
    """One array of each dtype, each with each kind of average; all on one thread."""
    for dtype in ("float32", "float64", "float16"):
        param, grad, ax = (np.ones(N_ELEMENTS, dtype) for _ in range(3))
        wide = np.ones(N_ELEMENTS)
        for average, own, mu in (
            ("no average", None, 1.0),
            ("copy", ax, 1.0),
            ("averaging", ax, 0.1),
            ("wide averages", wide, 0.1),
        ):
            if average == "wide averages" and dtype == "float64":
                continue
            try:
                for _ in range(times):
                    asgd_(param, grad, own, eta=0.01, mu=mu)
            except ValueError:
                continue  # older commits do not take all dtypes
            print(f"{dtype}, {average}", N_ELEMENTS, sep="\t")


def rows(times: int) -> None:
    """Many small arrays, twice: tables remember the arrays that they held last."""
    for average in ("no average", "averaging"):
        params, grads, axs = ([np.ones(64, np.float32) for _ in range(N_ARRAYS)] for _ in range(3))
        own = None if average == "no average" else axs
        for turn, n in (("at first", 1), ("again", times)):
            for _ in range(n):
                asgd_(params, grads, own, eta=0.01, mu=0.1)
            print(f"{average}, {turn}", N_ARRAYS, sep="\t")


if __name__ == "__main__":
    {"loops": loops, "rows": rows}[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 1)
