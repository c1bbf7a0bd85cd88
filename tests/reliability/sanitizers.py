"""Builds of the package by gcc with sanitizers, away from the source tree, and runs under them.

Compiler and sanitizer go together as CC, so that setup.py finds out by itself which flags they
take. Each report is written to a file, whoever swallows what a process prints.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from reliability.common import BUILD, copy_sources

# Appended to a module of the copy: the fault that UBSan must find. No call reaches it.
PLANTED = """

def planted_overflow(long long x):
    return x + 1
"""
KINDS = {
    "memory": ("-fsanitize=address,undefined", ["libasan.so", "libstdc++.so"]),
    "threads": ("-fsanitize=thread", ["libtsan.so"]),
}


@cache
def built(kind):
    """Return the folder of a build with a sanitizer, made anew where the sources are newer."""
    folder = BUILD / kind
    folder.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{kind}.lock").open("w") as lock:  # controls may run beside the part
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy_sources(folder, {"asgd_fast/_schedule.pyx": PLANTED})
        flags = KINDS[kind][0]
        log = BUILD / f"{kind}.log"
        with log.open("w") as output:
            status = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace", "-j2"],
                cwd=folder,
                env={
                    **os.environ,
                    "CC": f"gcc {flags} -g -fno-omit-frame-pointer",
                    "CFLAGS": "-fno-wrapv",  # with which CPython hides overflows from UBSan
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status:
            raise RuntimeError(f"the build with {flags} failed: see {log}")
    return folder


def run_under(kind, arguments, timeout, **environment):
    """Run Python in a build; a report of the sanitizer or a bad end is a finding.

    Returns
    -------
    str
        What was printed.
    """
    folder = built(kind)
    reports = BUILD / f"{kind}-reports-{os.getpid()}"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    preloaded = [
        subprocess.check_output(["gcc", f"-print-file-name={x}"], text=True).strip()
        for x in KINDS[kind][1]
    ]
    common = f"log_path={reports}/report:halt_on_error=1"
    program = [sys.executable, *map(str, arguments)]
    if kind == "threads" and shutil.which("setarch"):
        program = ["setarch", "-R", *program]  # this sanitizer wants addresses that do not vary
    result = subprocess.run(
        program,
        cwd=folder,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": f"{common}:detect_leaks=0:verify_asan_link_order=0",
            "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
            "TSAN_OPTIONS": common,
            "PYTHONMALLOC": "malloc",  # each object is a block of its own
            "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'tests'}",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    found = "".join(report.read_text()[:4000] for report in sorted(reports.iterdir()))
    shutil.rmtree(reports)
    assert not found, found
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def imports_the_build(kind):
    """Make sure that it is the build which is tried, not another one that is installed."""
    program = "import asgd_fast; print(asgd_fast.__file__)"
    found = run_under(kind, ["-c", program], 120).strip()
    assert Path(found).is_relative_to(BUILD), found
