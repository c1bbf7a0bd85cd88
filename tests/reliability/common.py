"""What the parts of the campaign share: seeds, numbers of runs, and processes of their own.

It does not know what is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.stateful import run_state_machine_as_test

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "reliability"


class Campaign:
    """One run of a part.

    Parameters
    ----------
    seed : int
        Chooses all that is random.
    scale : float
        Multiplies the numbers of runs.
    is_control : bool
        Whether a fault is planted, which need only be found, not made small.
    """

    def __init__(self, seed=0, scale=1.0, is_control=False):
        self.seed, self.scale, self.is_control = seed, scale, is_control
        self.counts = Counter()

    def times(self, n):
        """How often to do what a full campaign does n times."""
        return max(1, round(n * self.scale))

    def random(self):
        return Random(self.seed)

    def settings(self, n, **others):
        phases = [Phase.generate] if self.is_control else [Phase.generate, Phase.shrink]
        return settings(
            max_examples=self.times(n),
            phases=phases,
            database=None,
            deadline=None,
            derandomize=False,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.normal,
            **others,
        )

    def explore(self, n, strategy, check):
        """Check n examples of a strategy."""
        seed(self.seed)(self.settings(n)(given(strategy)(check)))()

    def walk(self, n, machine, n_steps):
        """Take n walks through a state machine."""
        machine = seed(self.seed)(machine)
        run_state_machine_as_test(machine, settings=self.settings(n, stateful_step_count=n_steps))


def copy_sources(folder, appended=None):
    """Copy the sources that differ, without what is built; return whether there were any.

    Parameters
    ----------
    folder : Path
    appended : dict of str to str, optional
        More text for single files.
    """
    names = [ROOT / x for x in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]
    for suffix in ("py", "pyx", "pxd", "pxi", "pyi", "h", "typed"):
        names += (ROOT / "asgd_fast").rglob(f"*.{suffix}")
    names += [x for x in (ROOT / "tests").rglob("*") if x.suffix in (".py", ".c", ".cpp")]
    has_changed = False
    for path in names:
        name = str(path.relative_to(ROOT))
        content = path.read_text() + (appended or {}).get(name, "")
        target = folder / name
        if not target.exists() or target.read_text() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)
            has_changed = True
    return has_changed


def python(program, *arguments, timeout=600, **environment):
    """Run a program, or a file, in a process of its own, which must end well.

    Returns
    -------
    str
        What it printed.
    """
    command = [str(program)] if isinstance(program, Path) else ["-c", program]
    result = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr[-4000:]}"
    return result.stdout


@contextmanager
def must_report(text):
    """Let only a finding with this text count, as what was planted is to be found."""
    try:
        yield
    except AssertionError as error:
        if text not in str(error):
            raise RuntimeError(f"not what was planted, {text}: {error}") from error
        raise
