"""Fail if a commit takes more instructions than its parent; `make bench-check` calls it.

    python asv_benchmarks/gate.py [base [head]]        (by default HEAD^ and HEAD)

Builds both commits and lets callgrind count the instructions of the cases of counted.py on each.
The gate knows no times: `asv continuous` compares those.

Exit status: 0 not slower, 1 slower, 2 nothing was measured.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import callgrind

ROOT = Path(__file__).resolve().parents[1]

NOT_SLOWER, SLOWER, NOTHING_MEASURED = 0, 1, 2

# The same build in another folder has counts that differ by up to 0.2 %.
LIMIT = 1.02


def main() -> int:
    """Measure two commits, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", nargs="?", default="HEAD^")
    parser.add_argument("head", nargs="?", default="HEAD")
    names = parser.parse_args()
    try:
        return compare(*measure(names.base, names.head))
    except RuntimeError as error:
        print(f"Nothing was measured: {error}")
    except Exception:  # uncaught, it would end Python with the status of a slower commit
        traceback.print_exc()
    return NOTHING_MEASURED


def measure(base: str, head: str) -> list[dict[str, float]]:
    """Build two commits and return the instructions of each case on each of them.

    Parameters
    ----------
    base, head : str
        Anything that git takes for a commit.

    Returns
    -------
    list of dict of str to float
        Instructions for each element or array, by case: first those of `base`.

    Raises
    ------
    RuntimeError
        Nothing can be measured; the message gives the reason.
    """
    if not callgrind.is_installed():
        raise RuntimeError("valgrind is not installed")
    commits = [_git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (base, head)]
    if commits[0] == commits[1]:
        raise RuntimeError(f"{base} and {head} are the same commit")
    if _git("status", "--porcelain", "--untracked-files=no"):
        print("Changes that are not committed are not measured.")
    print(f"Building {base} ({commits[0][:8]}) and {head} ({commits[1][:8]})", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        return list(pool.map(_count, [Path(folder, "base"), Path(folder, "head")], commits))


def _count(folder: Path, commit: str) -> dict[str, float]:
    """Install a commit with its dependencies into a folder and count its instructions."""
    archive, source = folder.with_suffix(".zip"), folder.with_suffix(".source")
    _git("archive", f"--output={archive}", commit)
    shutil.unpack_archive(archive, source)
    # From a folder pip always builds anew, with the same tools for both commits.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target"]
    if subprocess.run([*pip, folder, source], check=False).returncode:
        raise RuntimeError(f"commit {commit} could not be built")
    return {
        f"{workload}: {case}": instructions
        for workload in callgrind.FUNCTIONS
        for case, instructions in callgrind.count(folder, workload).items()
    }


def compare(before: dict[str, float], after: dict[str, float]) -> int:
    """Print the instructions of two commits and return whether the second takes more.

    Parameters
    ----------
    before, after : dict of str to float
        Instructions by case.

    Returns
    -------
    int
        `SLOWER` if any case takes more than `LIMIT` times as many instructions.

    Raises
    ------
    RuntimeError
        The commits have no case in common.
    """
    common = [case for case in before if case in after]
    for which, one, other in (("first", before, after), ("second", after, before)):
        alone = [case for case in one if case not in other]
        if alone:
            print(f"Cases of the {which} commit alone:", "; ".join(alone))
    if not common:
        raise RuntimeError("the commits have no case in common")
    slower = [case for case in common if after[case] > LIMIT * before[case]]
    print(f"{'instructions for each element or array':40}   before    after  ratio")
    for case in common:
        ratio = after[case] / before[case]
        mark = "  SLOWER" if case in slower else ""
        print(f"{case:40} {before[case]:8.2f} {after[case]:8.2f} {ratio:6.3f}{mark}")
    print(f"{len(slower)} of {len(common)} cases take over {LIMIT - 1:.0%} more instructions.")
    return SLOWER if slower else NOT_SLOWER


def _git(*arguments: str) -> str:
    """Return what git prints."""
    git = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {git.stderr.strip()}")
    return git.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
