"""Count the instructions of counted.py's cases, exactly: a build has the same counts in every run.

Knows the compiled functions by their names, today's and those of older commits. valgrind has no
AVX-512, so the loops of AVX2 are counted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).with_name("counted.py")

# The function that each workload of counted.py calls once for a case, as Cython names its wrapper.
FUNCTIONS = {
    "loops": rb"__pyx_pw_9asgd_fast_5_core_\d+update(?=\0)",
    "rows": rb"__pyx_pw_9asgd_fast_(?:6_table|5_rows_4rows)_\w+extend(?=\0)",
}


def is_installed() -> bool:
    """Return whether valgrind can be run."""
    return shutil.which("valgrind") is not None


def count(folder: Path, workload: str) -> dict[str, float]:
    """Return the instructions of each case of a workload.

    Parameters
    ----------
    folder : Path
        The folder that contains the package ``asgd_fast``.
    workload : str
        A key of `FUNCTIONS`.

    Returns
    -------
    dict of str to float
        Instructions for each element or array, by the names that counted.py prints. Empty where
        the package lacks the function.

    Raises
    ------
    RuntimeError
        The workload failed, or callgrind saw fewer calls than cases.
    """
    modules = sorted(Path(folder, "asgd_fast").rglob("*.so"))
    found = [x for m in modules for x in re.findall(FUNCTIONS[workload], m.read_bytes())]
    if not found:
        return {}
    function = found[0].decode()
    with tempfile.TemporaryDirectory() as dumps:
        script = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={dumps}/calls",
                "--collect-atstart=no",
                f"--toggle-collect={function}",
                f"--dump-after={function}",
                *(sys.executable, "-s", "-B", SCRIPT, workload),
            ],
            env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "0", "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        if script.returncode != 0:
            raise RuntimeError(f"counted.py {workload} failed under valgrind:\n{script.stderr}")
        counts = {}
        for i, line in enumerate(script.stdout.splitlines(), start=1):
            case, n = line.split("\t")
            counts[case] = _total(Path(dumps, f"calls.{i}")) / int(n)
    if not counts or 0 in counts.values():
        raise RuntimeError(
            f"callgrind did not see every call of {function}: {counts}\n{script.stderr}"
        )
    return counts


def _total(dump: Path) -> int:
    """Return the instructions of one call, 0 where callgrind saw no call."""
    text = dump.read_text() if dump.exists() else ""
    found = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0
