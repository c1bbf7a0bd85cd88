"""Run the campaign, or parts of it: `make reliability`, `make reliability RELIABILITY="--help"`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reliability import report
from reliability.common import BUILD, Campaign

# The longest first. Each with the scale of its controls, which end when they have found something.
PARTS = {
    "memory_errors": 1.0,
    "pythons": 0.02,
    "out_of_memory": 0.1,
    "races": 0.2,
    "arrays": 1.0,
    "array_lives": 1.0,
    "capsules": 1.0,
    "checkpoints": 0.3,
    "interrupts": 0.2,
    "leaks": 0.2,
    "beside_torch": 1.0,
}
# Exit statuses. Python's own 1 is not among them: what nobody has caught is no finding.
FOUND, BROKEN = 3, 4
CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL}


def run_here(name, seed, scale, control, out):
    """Run one part in this process; the exit status says whether it found something."""
    part = importlib.import_module(f"reliability.{name}")
    campaign = Campaign(seed, scale, is_control=control is not None)
    try:
        if control is None:
            part.run(campaign)
        else:
            with part.CONTROLS[control]():
                part.run(campaign)
    except AssertionError as error:
        print(f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n")
        return FOUND
    except Exception:
        import traceback

        traceback.print_exc()
        return BROKEN
    if out:
        Path(out).write_text(json.dumps(campaign.counts))
    return 0


def run_apart(name, seed, scale, control=None):
    """Run one part in a process of its own, which may crash.

    Returns
    -------
    status : int
    counts : dict of str to int
    printed : str
    seconds : float
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    out = BUILD / f"{name}-{os.getpid()}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-X", "faulthandler", "-m", "reliability", name, "--here"]
    command += ["--seed", str(seed), "--scale", str(scale), "--out", str(out)]
    command += [] if control is None else ["--control", control]
    # The order of sets is random otherwise, and with it which allocation is the n-th.
    environment = {**os.environ, "PYTHONHASHSEED": str(seed % 2**32)}
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    counts = json.loads(out.read_text()) if out.exists() else {}
    out.unlink(missing_ok=True)
    return result.returncode, counts, result.stdout + result.stderr, time.monotonic() - start


def run_part(name, seed, scale):
    """Run the controls of a part, then the part; say what became of each.

    Returns
    -------
    report.Outcome
    """
    controls = {}
    for control in importlib.import_module(f"reliability.{name}").CONTROLS:
        status, _, printed, _ = run_apart(name, seed, PARTS[name], control)
        # A crash is a finding too; an error of the campaign's own is not.
        controls[control] = status in {FOUND, *CRASHES}
        say(name, f"control, {control}: {'found' if controls[control] else 'NOT FOUND'}")
        if not controls[control]:
            say(name, printed[-3000:])
    status, counts, printed, seconds = run_apart(name, seed, scale)
    for what, n in counts.items():
        say(name, f"{what}: {n:,}")
    if status:
        say(name, f"RED, exit status {status}\n{printed[-6000:]}")
    for what in report.missing(counts):
        say(name, f"RED, none of {what}")
    return report.Outcome(name, status == 0, counts, controls, seconds)


def say(name, text):
    print(f"{name}: {text}", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of runs")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write the figures of these parts into docs/reliability.md",
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--control", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such parts: {sorted(unknown)}")
    if given.here:
        return run_here(given.parts[0], given.seed, given.scale, given.control, given.out)
    start, source = time.monotonic(), report.source()
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(
            pool.map(lambda x: run_part(x, given.seed, given.scale), given.parts or PARTS)
        )
    minutes = (time.monotonic() - start) / 60
    rows = report.rows(outcomes, source, given.seed, given.scale)
    print(*report.HEAD, *rows.values(), f"In {minutes:.0f} minutes.", sep="\n")
    if given.save:
        report.save(rows)
    return 0 if all(x.is_green for x in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
