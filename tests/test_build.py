"""What setup.py makes of the compiler and of the CFLAGS that it finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asgd_fast
from asgd_fast import _core

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

BUILD = """
import sys
import setuptools
from distutils.core import run_setup
folder, *names = sys.argv[1:]
arguments = ["-q", "build_ext", "--build-lib", folder, "--build-temp", folder + "/objects"]
distribution = run_setup("setup.py", arguments, stop_after="commandline")
distribution.ext_modules = [x for x in distribution.ext_modules if x.name in names]
distribution.run_commands()
"""


def run(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def build(folder, *names, **environment):
    """Build some modules of the package; return the files."""
    result = run("-c", BUILD, folder, *names, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [next(folder.glob(name.replace(".", "/") + ".*"), None) for name in names]


def compiler(folder, script):
    """Make a compiler of a shell script."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("flags", ["-Ofast", "-funsafe-math-optimizations"])
def test_subnormal_numbers_stay_what_they_are(tmp_path, flags):
    """In the whole process, after a module is loaded that was built with fast mathematics."""
    (file,) = build(tmp_path, "asgd_fast._schedule", CFLAGS=flags)
    program = """
import sys, numpy
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("asgd_fast._schedule", sys.argv[1])
spec.loader.exec_module(module_from_spec(spec))
print(numpy.array([5e-324]) * 1.0, numpy.array([1e-45], numpy.float32) / numpy.float32(1.0))
"""
    assert run("-c", program, file, cwd=tmp_path).stdout == "[5.e-324] [1.e-45]\n"


def test_fast_mathematics_in_cflags_changes_no_bit(tmp_path):
    """Sums that are reordered or contracted, flushed numbers and lost nans would show."""
    ignored = shutil.ignore_patterns("*.c", "__pycache__")
    shutil.copytree(ROOT / "asgd_fast", tmp_path / "asgd_fast", ignore=ignored)
    flags = "-Ofast -funsafe-math-optimizations -ffinite-math-only -ffp-contract=fast"
    (file,) = build(tmp_path, f"asgd_fast._cpu.{_core.simd_level()}", CFLAGS=flags)
    assert file is not None
    program = """
import hashlib
import numpy as np
import asgd_fast
rng = np.random.default_rng(0)
digest = hashlib.sha256()
with np.errstate(all="ignore"):
    for dtype in ("float16", "float32", "float64"):
        p, g, ax = (rng.normal(size=2000).astype(dtype) for _ in range(3))
        g[::7] *= np.finfo(dtype).smallest_normal
        p[::11] *= np.finfo(dtype).smallest_normal
        g[:3] = np.inf, -np.inf, np.nan
        for mu in (1.0, 0.3):
            asgd_fast.asgd_(p, g, ax, eta=0.1, mu=mu, lambd=0.3, weight_decay=0.7)
            digest.update(np.nan_to_num(p, nan=1).tobytes() + np.nan_to_num(ax, nan=1).tobytes())
print(asgd_fast.__file__, digest.hexdigest())
"""
    there = run("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    here = run("-c", program, PYTHONPATH=str(Path(asgd_fast.__file__).parents[1]))
    assert there.stdout.startswith(str(tmp_path)), there.stderr
    assert there.stdout.split()[1:] == here.stdout.split()[1:] != []


def test_a_sanitizer_leaves_out_no_simd_level(tmp_path):
    names = [f"asgd_fast._cpu.{level}" for level in _core.simd_levels()]
    fast = compiler(tmp_path, 'exec cc "$@" -O0')  # the code is not run
    assert None not in build(tmp_path, *names, CFLAGS="-fsanitize=address", CC=fast)


@pytest.mark.skipif("avx2" not in _core.simd_levels(), reason="AVX2 is not of this machine")
def test_a_part_of_a_levels_instructions_may_be_in_cflags(tmp_path):
    """As a distribution may ask for AVX2, which does not stand for FMA and F16C."""
    fast = compiler(tmp_path, 'exec cc "$@" -O0')  # the code is not run
    assert None not in build(tmp_path, "asgd_fast._cpu.baseline", CFLAGS="-mavx2", CC=fast)


@pytest.mark.parametrize("flag", ["-ffp-contract=off", "-fno-fast-math"])
def test_without_a_flag_for_exactness_there_is_no_build(tmp_path, flag):
    refuses = compiler(tmp_path, f'case "$*" in *{flag}*) exit 1;; esac; exec cc "$@"')
    result = run("-c", BUILD, tmp_path, "asgd_fast._schedule", CC=refuses)
    assert result.returncode != 0
    assert flag in result.stderr
    assert "without which results would have other bits" in result.stderr
