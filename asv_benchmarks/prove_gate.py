"""Show that the gate sees a loop that is 20 % slower, and is quiet about one that is not.

    python asv_benchmarks/prove_gate.py [--runs 5]

In a clone, with three commits on top of HEAD: one that changes nothing, one that updates a fifth of
the elements twice, and one that does not build, of which nothing can be measured. Takes about half
an hour.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLONE = ROOT / ".asv" / "clone"
CORE = CLONE / "asgd_fast" / "_core.pyx"

LOOP = "    work.loops.update[row.kind][row.ax_size](row, start, stop)\n"
A_FIFTH_MORE = LOOP.replace(" stop,", " start + (stop - start) // 5,")

VERDICT = re.compile(r"^(instructions|times): (.+)$", re.MULTILINE)


def main() -> None:
    """Make the commits, run the gate on each, and count what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs

    shutil.rmtree(CLONE, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", ROOT, CLONE], check=True)
    text = CORE.read_text()
    if text.count(LOOP) != 1:
        raise SystemExit(f"{CORE} has no line to plant a slowdown at: {LOOP.strip()}")
    base = _git("rev-parse", "HEAD")
    commits = {
        "identical": _commit("identical", text, base),
        "planted": _commit("planted", text.replace(LOOP, LOOP + A_FIFTH_MORE), base),
        "broken": _commit("broken", text + "\ncdef broken(\n", base),
    }
    said: dict[str, Counter[str]] = {name: Counter() for name in commits}
    for i in range(runs):
        for name, commit in commits.items():
            if name == "broken" and i:
                continue
            gate = subprocess.run(
                [sys.executable, CLONE / "asv_benchmarks" / "gate.py", base, commit],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            (ROOT / ".asv" / f"gate-{name}-{i}.log").write_text(gate.stdout)
            verdicts = [f"{what}: {verdict}" for what, verdict in VERDICT.findall(gate.stdout)]
            said[name].update([*verdicts, f"exit status {gate.returncode}"])
            print(f"{name}, run {i + 1}:", *verdicts, gate.returncode, sep="  ", flush=True)
    for name, counts in said.items():
        print(f"\n{name}")
        for what, n in sorted(counts.items()):
            print(f"  {n} of {counts.total() // 3}  {what}")


def _commit(name: str, core: str, base: str) -> str:
    """Commit a text of the core on top of `base`, and return the hash."""
    _git("checkout", "--quiet", base)
    CORE.write_text(core)
    author = ("-c", "user.name=gate", "-c", "user.email=gate@localhost")
    _git(*author, "commit", "--quiet", "--all", "--allow-empty", "--message", name)
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=CLONE, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
