"""The package built and tried by every CPython from 3.10 on that is installed, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from reliability.common import BUILD, ROOT, copy_sources, must_report

VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t", "3.15", "3.15t"]
PARTS = ["arrays", "array_lives", "capsules", "checkpoints", "interrupts", "out_of_memory"]

TRIAL = """
import json, sys
import asgd_fast
assert "site-packages" in asgd_fast.__file__, asgd_fast.__file__
# The package does not declare that it goes without the GIL, so the interpreter takes it.
assert getattr(sys, "_is_gil_enabled", lambda: True)(), "runs without the GIL"
from reliability import {parts}
from reliability.common import Campaign
counts = {{}}
for part in ({parts},):
    campaign = Campaign({seed}, {scale})
    part.run(campaign)
    counts |= campaign.counts
print(json.dumps(counts))
"""


def interpreters():
    """Return the interpreters that are found, pyenv's too, by version."""
    program = (
        "import sys, sysconfig; t = 't' * bool(sysconfig.get_config_var('Py_GIL_DISABLED'));"
        "print('%d.%d%s' % (*sys.version_info[:2], t), sys.executable)"
    )
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in VERSIONS:
        for candidate in f"python{version}", *pyenv.glob(f"{version.rstrip('t')}.*/bin/python"):
            # pyenv's shims are there for interpreters which do not run.
            with suppress(OSError, subprocess.CalledProcessError):
                printed = subprocess.check_output(
                    [candidate, "-c", program], text=True, stderr=subprocess.DEVNULL
                )
                name, _, path = printed.strip().partition(" ")
                if name == version:
                    found.setdefault(version, path)
    return found


def installed(version, path):
    """Return the interpreter of an environment that has the package and what the trial takes."""
    folder, sources = BUILD / f"python{version}", BUILD / f"python{version}-sources"
    own = folder / "bin" / "python"
    if not copy_sources(sources) and own.exists():
        return own
    try:
        _called(path, "-m", "venv", "--clear", folder)
        _called(own, "-m", "pip", "install", "--quiet", sources, "hypothesis")
    except BaseException:
        shutil.rmtree(sources)  # so that the next run tries again
        raise
    return own


def _called(*command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}:\n{result.stderr[-3000:]}"


_planted = ""


def run(campaign):
    found = interpreters()
    for version, path in found.items():
        own = installed(version, path)
        program = TRIAL.format(
            parts=", ".join(PARTS), seed=campaign.seed, scale=0.03 * campaign.scale
        )
        is_faulty = bool(_planted) and version == list(found)[-1]
        not_wanted = ("PYTHONPATH", "PYTHON_GIL")
        environment = {k: x for k, x in os.environ.items() if k not in not_wanted}
        result = subprocess.run(
            [own, "-X", "faulthandler", "-c", _planted * is_faulty + program],
            cwd=BUILD,
            env={**environment, "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
            check=False,
        )
        with must_report("Segmentation fault") if is_faulty else nullcontext():
            assert result.returncode == 0, f"CPython {version}:\n{result.stderr[-4000:]}"
        counts = json.loads(result.stdout.splitlines()[-1])
        total = sum(
            n for name, n in counts.items() if not name.endswith(("accepted", "interrupted"))
        )
        campaign.counts[f"trials by CPython {version}"] += total


@contextmanager
def _crashing():
    """A call that ends the interpreter."""
    global _planted
    _planted = "import ctypes, asgd_fast; asgd_fast.asgd_ = lambda *x, **y: ctypes.string_at(0)\n"
    try:
        yield
    finally:
        _planted = ""


CONTROLS = {"a call that crashes the last CPython": _crashing}
