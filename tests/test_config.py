"""show_config and python -m asgd_fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

import asgd_fast
from asgd_fast import _core


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "asgd_fast", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_facts_are_those_of_this_process():
    config = asgd_fast.show_config("dicts")
    assert config["cpu"]["simd"] == _core.simd_level()
    assert config["cpu"]["simd available"][-1] == "baseline"
    assert config["arrays"]["numpy"] == f"{np.__version__}, through its versioned capsule 1.0"
    assert config["arrays"]["torch"] == f"{version('torch')}, through its exchange API 1.3"
    assert config["build"]["compiler"]


def test_text_and_json_say_the_same():
    text, as_json = run(), run("--json")
    assert text.returncode == as_json.returncode == 0, text.stderr + as_json.stderr
    assert text.stderr == as_json.stderr == ""
    for section, facts in json.loads(as_json.stdout).items():
        assert f"{section}:\n" in text.stdout
        for name, value in facts.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            assert f"  {name}: {shown}\n" in text.stdout


@pytest.mark.parametrize("level", _core.simd_levels())
def test_the_simd_level_can_be_lowered(level):
    config = json.loads(run("--json", ASGD_FAST_SIMD=level).stdout)
    assert config["cpu"]["simd"] == level


def test_an_unknown_simd_level_is_refused():
    result = run(ASGD_FAST_SIMD="mmx")
    assert result.returncode != 0
    assert "SIMD level 'mmx' is not to be had; expected one of [" in result.stderr


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: got 'yaml'; expected 'stdout' or 'dicts'"):
        asgd_fast.show_config("yaml")
