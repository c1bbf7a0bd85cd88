"""Instructions, counted by callgrind: exact, so that one more in the loop is seen on any machine.

valgrind has no AVX-512: the loops of the level below are counted, made of the same source. What it
cannot see is memory: for that there are times.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from .cases import rounded, skip, skip_old, titled

NO_VALGRIND = "valgrind is not installed"

# The instructions of each case of counted.py; or why there are none.
Counts: TypeAlias = "dict[str, float] | str"


def _counted(workload: str) -> Counts:
    """Return the instructions of each case of a workload."""
    import callgrind

    if not callgrind.is_installed():
        return NO_VALGRIND
    spec = find_spec("asgd_fast")
    assert spec is not None
    assert spec.origin is not None
    return callgrind.count(Path(spec.origin).parents[1], workload)


def _count(counts: Counts, case: str) -> float:
    """Return the instructions of one case; skip a case that the machine or commit lacks."""
    if isinstance(counts, str):
        skip(counts)
    if case not in counts:
        skip_old(f"this commit has no case {case!r}")
    return rounded(counts[case])


class Loop:
    """The inner loop, and the call of the engine around it, for 65,536 elements on one thread."""

    version = "2"
    timeout = 300
    unit = "instructions per element"
    params = (
        ("float32", "float64", "float16"),
        ("no average", "copy", "averaging", "wide averages"),
    )
    param_names = ("dtype", "average")
    skip_params = (("float64", "wide averages"),)  # nothing is wider

    def setup_cache(self) -> Counts:
        return _counted("loops")

    @titled("instructions of the inner loop (AVX2)")
    def track_loop(self, counts: Counts, dtype: str, average: str) -> float:
        return _count(counts, f"{dtype}, {average}")


class Gathering:
    """Reading and checking 1,000 NumPy arrays each of params, gradients and averages."""

    version = "1"
    timeout = 300
    unit = "instructions per param"
    params = (("no average", "averaging"), ("at first", "again"))
    param_names = ("average", "turn")

    def setup_cache(self) -> Counts:
        return _counted("rows")

    @titled("instructions of taking arrays in")
    def track_gathering(self, counts: Counts, average: str, turn: str) -> float:
        return _count(counts, f"{average}, {turn}")
