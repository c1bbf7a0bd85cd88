"""show_config and python -m asgd_fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import asgd_fast
from asgd_fast import _core, config


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "asgd_fast", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_facts_are_those_of_this_process():
    facts = asgd_fast.show_config("dicts")
    assert facts["cpu"]["simd"] == _core.simd_level()
    assert facts["cpu"]["simd available"][-1] == "baseline"
    assert facts["arrays"]["numpy"] == f"{np.__version__}, through its C interface"
    assert facts["arrays"]["torch"] == f"{version('torch')}, through its exchange API 1.3"
    assert facts["cpu"]["threads"] == asgd_fast.get_num_threads()
    assert "omp" in Path(facts["cpu"]["openmp"]).name
    assert facts["build"]["compiler"].startswith(("gcc ", "clang ", "msvc "))


def test_text_and_json_say_the_same():
    text, as_json = run(), run("--json")
    assert text.returncode == as_json.returncode == 0, text.stderr + as_json.stderr
    assert text.stderr == as_json.stderr == ""
    for section, facts in json.loads(as_json.stdout).items():
        assert f"{section}:\n" in text.stdout
        for name, value in facts.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            assert f"  {name}: {shown}\n" in text.stdout


def test_a_fresh_process_shows_the_runtime_that_torch_brings():
    torch_brings = [path for path in Path(torch.__file__).parent.rglob("*") if "omp" in path.name]
    openmp = json.loads(run("--json").stdout)["cpu"]["openmp"]
    own = os.path.realpath(openmp)
    assert own in {os.path.realpath(path) for path in torch_brings}, own


def test_the_version_is_that_of_the_installation():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"asgd_fast {version('asgd_fast')}\n")


def test_a_build_that_is_not_installed_shows_what_it_is(tmp_path):
    """As one in place in a clone, which has no metadata."""
    site_packages = Path(np.__file__).parents[1]
    package = Path(asgd_fast.__file__).parent
    others = (site_packages / name for name in ("numpy", "numpy.libs", "threadpoolctl.py"))
    for path in (package, *filter(Path.exists, others)):
        (tmp_path / path.name).symlink_to(path)
    result = subprocess.run(
        [sys.executable, "-S", "-m", "asgd_fast"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert "  asgd_fast: not installed\n" in result.stdout


@pytest.mark.parametrize("level", _core.simd_levels())
def test_the_simd_level_can_be_lowered(level):
    facts = json.loads(run("--json", ASGD_FAST_SIMD=level).stdout)
    assert facts["cpu"]["simd"] == level


def test_an_unknown_simd_level_is_refused():
    result = run(ASGD_FAST_SIMD="mmx")
    assert result.returncode != 0
    assert "SIMD level 'mmx' is not available; expected one of [" in result.stderr


@pytest.mark.parametrize(
    ("installed", "raises", "shown"),
    [
        (None, None, "not installed"),
        ("9.9", ImportError("no libcuda"), "9.9, unusable: ImportError: no libcuda"),
        ("9.9", RuntimeError("two runtimes"), "9.9, unusable: RuntimeError: two runtimes"),
    ],
)
def test_a_library_that_is_missing_or_broken_is_a_finding(monkeypatch, installed, raises, shown):
    def broken(name):
        raise raises

    monkeypatch.setattr(config, "_LIBRARIES", {"cupy": "cupy"})
    monkeypatch.setattr(config, "_version", lambda name: installed or "not installed")
    monkeypatch.setattr(config, "import_module", broken)
    assert config.show_config("dicts")["arrays"] == {"cupy": shown}


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: got 'yaml'; expected 'stdout' or 'dicts'"):
        asgd_fast.show_config("yaml")
