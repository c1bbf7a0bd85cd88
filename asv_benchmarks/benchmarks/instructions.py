"""Instructions, counted by callgrind: exact, so that one more in the loop is seen on any machine.

valgrind has no AVX-512: the loops of the level below are counted, made of the same source. What it
cannot see is memory: for that there are times.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from .cases import rounded, skip, skip_old, titled

SCRIPT = Path(__file__).resolve().parents[1] / "counted.py"

NO_VALGRIND = "valgrind is not installed"

# By the names that the script prints, of one element or array; or why there are none.
Counts: TypeAlias = "dict[str, float] | str"


def _counted(workload: str, module: str, function: str) -> Counts:
    """Return the instructions of each call of a Cython function that a workload makes.

    Parameters
    ----------
    workload : str
        Of counted.py.
    module : str
        The name of the module of `asgd_fast` that has the function.
    function : str
        As it ends.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return NO_VALGRIND
    spec = find_spec(f"asgd_fast.{module}")
    if spec is None or spec.origin is None:
        return f"this commit has no {module}"
    wrapper = re.search(
        rb"__pyx_pw_9asgd_fast_\w+_\d+" + function.encode() + rb"(?=\0)",
        Path(spec.origin).read_bytes(),
    )
    if wrapper is None:
        return f"{spec.origin} has no symbol of {function}"
    name = wrapper[0].decode()
    with tempfile.TemporaryDirectory() as folder:
        script = subprocess.run(
            [
                valgrind,
                "--tool=callgrind",
                f"--callgrind-out-file={folder}/calls",
                "--collect-atstart=no",
                f"--toggle-collect={name}",
                f"--dump-after={name}",
                *(sys.executable, "-I", "-B", SCRIPT, workload),
            ],
            env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        counts = {}
        for i, line in enumerate(script.stdout.splitlines(), start=1):
            case, n = line.split("\t")
            counts[case] = _total(Path(folder, f"calls.{i}")) / int(n)
    if not counts or 0 in counts.values():
        raise RuntimeError(f"callgrind did not see all calls of {name}: {counts} {script.stderr}")
    return counts


def _total(path: Path) -> int:
    found = re.search(r"^totals: (\d+)$", path.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _count(counts: Counts, case: str) -> float:
    if counts == NO_VALGRIND:
        skip(NO_VALGRIND)
    if isinstance(counts, str):
        skip_old(counts)
    if case not in counts:
        skip_old("this commit does not take the arrays")
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
        return _counted("loops", "_core", "update")

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
        return _counted("rows", "_table", "extend")

    @titled("instructions of taking arrays in")
    def track_gathering(self, counts: Counts, average: str, turn: str) -> float:
        return _count(counts, f"{average}, {turn}")
