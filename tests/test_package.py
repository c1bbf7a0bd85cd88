"""The package as a whole: its public names, and what importing it brings in."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import metadata, version

import pytest

import asgd_fast


def test_every_public_name_is_there():
    assert {"__version__", *asgd_fast.__all__} <= set(dir(asgd_fast))
    assert all(callable(getattr(asgd_fast, name)) for name in asgd_fast.__all__)
    assert asgd_fast.__version__ == version("asgd_fast") == metadata("asgd_fast")["Version"]
    with pytest.raises(AttributeError, match="has no attribute 'adam'"):
        asgd_fast.adam  # noqa: B018


def said_by(code):
    """What a process of its own prints, as words."""
    arguments = [sys.executable, "-c", code]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()


def test_the_import_brings_in_numpy_alone():
    brought_in = said_by(
        "import sys, numpy; before = set(sys.modules); import asgd_fast; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    foreign = set(brought_in) - set(sys.stdlib_module_names)
    # Cython registers modules of its own, for what its extensions share.
    assert {name for name in foreign if "cython" not in name} == {"asgd_fast"}


def test_only_one_simd_level_is_loaded():
    loaded = said_by("import sys, asgd_fast; print(*sys.modules)")
    assert sum(name.startswith("asgd_fast._cpu.") for name in loaded) == 1
