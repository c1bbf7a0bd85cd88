"""Compare a commit with its parent, and fail if it is slower, or if nothing was measured.

    python asv_benchmarks/gate.py [base [head]]        (by default HEAD^ and HEAD; make bench-check)

asv builds both commits and measures them in turn. Instructions are exact: 2 % more of them fail.
Times are compared where a figure can be trusted on a busy machine: the time that one thread had a
processor, at least ten microseconds, four rounds of each commit in turn. One that is 10 % slower,
by asv's statistics too, is measured again, and fails if it is slower again. Where most of all times
are too uncertain to tell so much, all are measured again, and if they are still, nothing can be
said.

Exit status: 0 not slower, 1 slower, 2 nothing can be said.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".asv" / "gate"

SAME, SLOWER, UNKNOWN = 0, 1, 2

# What asv says when a benchmark is slower. Its exit status alone does not tell that from a build
# that failed.
DECREASED = "PERFORMANCE DECREASED"

# A line of asv's table: mark, before, after, ratio, benchmark.
SLOWER_ROW = re.compile(r"^\| \+ +\|[^|]+\|[^|]+\|[^|]+\| (.+?) +\|$", re.MULTILINE)


@dataclass(frozen=True)
class Stage:
    """Benchmarks that are compared in one go, by regular expressions of their names with params."""

    name: str
    benchmarks: tuple[str, ...]
    factor: float
    options: tuple[str, ...] = ()
    again: bool = False  # whether what is slower, or uncertain, is measured once more


class Figures(NamedTuple):
    """What was measured of one benchmark.

    Attributes
    ----------
    base, head : float
        The figures of both commits, nan where there is none.
    error : float
        By which share of itself either scatters: half of what the middle half of its samples span.
    """

    base: float
    head: float
    error: float = 0.0


STAGES = (
    Stage("instructions", (r"^instructions\.",), 1.02),
    Stage(
        "times",
        (
            r"^arrays\.Sizes\.time_asgd\((100000|1000000), ",
            r"^arrays\.Arrays\.time_asgd\(.*1,000",
            r"^arrays\.Dtypes\.time_asgd\(",
            r"^torch_optimizer\.Tensors\.time_step\(.*1,000",
        ),
        1.1,
        ("-a", "rounds=4", "-a", "sample_time=0.02"),
        again=True,
    ),
)


def main() -> int:
    """Compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", nargs="?", default="HEAD^")
    parser.add_argument("head", nargs="?", default="HEAD")
    arguments = parser.parse_args()
    try:
        base, head = (
            _git("rev-parse", f"{x}^{{commit}}") for x in (arguments.base, arguments.head)
        )
    except subprocess.CalledProcessError:  # which git has told of
        return UNKNOWN
    if base == head:
        print(f"{arguments.base} and {arguments.head} are one commit: there is nothing to compare.")
        return UNKNOWN
    import asv_machine

    asv_machine.setup()
    sources = ("asgd_fast", "setup.py", "pyproject.toml")
    if _git("status", "--porcelain", "--untracked-files=no", *sources):
        print("Changes that are not committed are not measured.")
    statuses = {stage.name: UNKNOWN for stage in STAGES}
    for stage in STAGES:
        statuses[stage.name] = check(stage, base, head)
        if statuses[stage.name] == UNKNOWN:
            break  # mostly a build that failed, and would again
    for name, status in statuses.items():
        print(f"{name}: {('not slower', 'SLOWER', 'NOT MEASURED')[status]}")
    return max(statuses.values())


def check(stage: Stage, base: str, head: str) -> int:
    """Return whether a commit is slower in one stage.

    Parameters
    ----------
    stage : Stage
    base, head : str
        The commits' full hashes.

    Returns
    -------
    int
        `SAME`, `SLOWER` or `UNKNOWN`.
    """
    status, output, measured = _compare(stage, stage.benchmarks, base, head)
    said = verdict(status, output, measured, stage.factor)
    if said == UNKNOWN and stage.again and uncertain(measured, stage.factor):
        status, output, measured = _compare(stage, stage.benchmarks, base, head)
        said = verdict(status, output, measured, stage.factor)
    if said != SLOWER or not stage.again:
        return said
    slower = SLOWER_ROW.findall(output)
    if not slower:
        return UNKNOWN  # asv's table has another form
    once_more = _compare(stage, [f"^{re.escape(name)}$" for name in slower], base, head)
    return verdict(*once_more, stage.factor, len(measured))


def _compare(
    stage: Stage, benchmarks: Sequence[str], base: str, head: str
) -> tuple[int, str, dict[str, Figures]]:
    """Measure both commits, and return asv's exit status, its output and the figures."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    status, output = _asv(stage, benchmarks, base, head)
    return status, output, figures(FOLDER / "results", base, head)


def verdict(
    status: int, output: str, measured: dict[str, Figures], factor: float, n_cases: int = 0
) -> int:
    """Return what asv's run says.

    Parameters
    ----------
    status : int
        The exit status of ``asv continuous``.
    output : str
        What it printed.
    measured : dict of str to Figures
    factor : float
        How much slower is slower.
    n_cases : int
        Where some cases alone were measured once more: how many there are, so that a few that
        always scatter are not most.

    Returns
    -------
    int
        `SAME`, `SLOWER` or `UNKNOWN`: the last where nothing was measured, what the base has a
        figure for was not, or figures of most cases are too uncertain.
    """
    lost = [x for x, each in measured.items() if math.isnan(each.head) > math.isnan(each.base)]
    n_both = sum(not math.isnan(each.base + each.head) for each in measured.values())
    n_uncertain = len(uncertain(measured, factor))
    print(
        f"{n_both} figures of both commits, {n_uncertain} of them uncertain by more than "
        f"{factor - 1:.0%}"
    )
    if lost:
        print("figures of the first commit alone:", ", ".join(lost))
    if not n_both or lost:
        return UNKNOWN
    if DECREASED in output:
        return SLOWER
    return SAME if status == 0 and 2 * n_uncertain <= max(n_cases, n_both) else UNKNOWN


def uncertain(measured: dict[str, Figures], factor: float) -> list[str]:
    """Return the benchmarks whose figures scatter by more than would be slower.

    Parameters
    ----------
    measured : dict of str to Figures
    factor : float
        How much slower is slower.

    Returns
    -------
    list of str
    """
    return [
        name
        for name, each in measured.items()
        if not math.isnan(each.base + each.head) and each.error > factor - 1
    ]


def figures(results: Path, base: str, head: str) -> dict[str, Figures]:
    """Return the figures of two commits that asv has written.

    Parameters
    ----------
    results : Path
        A folder of results.
    base, head : str
        Full hashes.

    Returns
    -------
    dict of str to Figures
        By benchmark and the number of its combination of params.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {base: {}, head: {}}
    for path in results.glob("*/*-*.json"):
        result = json.loads(path.read_text())
        for name, columns in result["results"].items():
            own = dict(zip(result["result_columns"], columns, strict=False))
            values = own["result"] or [None]
            lows, highs = (own.get(f"stats_q_{x}") or values for x in (25, 75))
            for i, (x, low, high) in enumerate(zip(values, lows, highs, strict=True)):
                found[result["commit_hash"]][f"{name} #{i}"] = _figure(x, low, high)
    nothing = (math.nan, 0.0)
    measured = {}
    for name in sorted(found[base].keys() | found[head].keys()):
        (x, error), (y, other) = (found[commit].get(name, nothing) for commit in (base, head))
        measured[name] = Figures(x, y, max(error, other))
    return measured


def _figure(x: float | None, low: float | None, high: float | None) -> tuple[float, float]:
    """Return a figure and its error, as a share of it."""
    if x is None:
        return math.nan, 0.0
    if low is None or high is None:  # of too few samples
        return x, math.inf
    return x, (high - low) / 2 / x if x else 0.0


def configuration(path: Path) -> dict[str, Any]:
    """Return a configuration of asv: JSON with whole lines of comment.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
    """
    found: dict[str, Any] = json.loads(
        re.sub(r"^ *//.*$", "", path.read_text(), flags=re.MULTILINE)
    )
    return found


def _asv(stage: Stage, benchmarks: Sequence[str], base: str, head: str) -> tuple[int, str]:
    """Run ``asv continuous``, with results of its own, and return its exit status and output."""
    config = configuration(ROOT / "asv.conf.json")
    for name in ("repo", "benchmark_dir", "env_dir"):
        config[name] = str(ROOT / config[name])
    config.update(results_dir=str(FOLDER / "results"), plugins=[])
    FOLDER.mkdir(parents=True)
    path = FOLDER / "asv.conf.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "asv", "--config", str(path), "continuous", "--show-stderr"]
    command += ["-f", str(stage.factor), *stage.options]
    for benchmark in benchmarks:
        command += ["-b", benchmark]
    process = subprocess.Popen(
        [*command, base, head], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
