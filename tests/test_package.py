"""The package as a whole: its public names, and what importing it brings in."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import typing
from importlib.metadata import metadata, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import asgd_fast

HAS_TORCH = find_spec("torch") is not None


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


WITHOUT_TORCH = """
import contextlib, inspect, io, pydoc, rlcompleter, sys, unittest.mock
sys.modules["torch"] = None
import asgd_fast
"""


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("hasattr(asgd_fast, 'ASGD')", False),
        ("getattr(asgd_fast, 'ASGD', 1)", 1),
        ("'ASGD' in dir(asgd_fast)", False),
        ("'ASGD' in dict(inspect.getmembers(asgd_fast))", False),
        ("'ArrayASGD' in dict(inspect.getmembers(asgd_fast))", True),
        ("'class ArrayASGD' in pydoc.render_doc(asgd_fast, renderer=pydoc.plaintext)", True),
        ("rlcompleter.Completer().complete('asgd_fast.Arr', 0)", "asgd_fast.ArrayASGD("),
        ("rlcompleter.Completer().complete('asgd_fast.ASG', 0)", None),
        ("exec('from asgd_fast import *') or 'ArrayASGD' in vars()", True),
    ],
)
def test_without_torch_the_package_can_be_looked_into(expression, value):
    code = f"{WITHOUT_TORCH}\nprint(repr({expression}).replace(' ', ''))"
    assert said_by(code) == [repr(value)]


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("asgd_fast.ASGD", "AttributeError: asgd_fast.ASGD needs torch, 2.4 or newer, which"),
        ("from asgd_fast import ASGD", "ImportError: asgd_fast.ASGD needs torch, 2.4 or newer"),
        ("from asgd_fast import Schedule, ASGD", "ImportError: asgd_fast.ASGD needs torch"),
        ("with unittest.mock.patch('asgd_fast.ASGD'): pass", "AttributeError: "),
        ("from asgd_fast import ASDG", "ImportError: cannot import name 'ASDG' from 'asgd_fast'"),
    ],
)
def test_without_torch_each_way_to_its_name_has_its_error(statement, error):
    result = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_TORCH}\n{statement}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr.splitlines()[-1].startswith(error), result.stderr


STUBS = {
    "empty": "types.ModuleType('torch')",
    "with a class": "types.SimpleNamespace(Tensor=type('Tensor', (), {}))",
    "of a mock": "unittest.mock.MagicMock()",
}


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS)
def test_a_stub_of_torch_is_no_torch(stub):
    """As tests of other packages put one in its place."""
    code = f"""
import sys, types, unittest.mock
sys.modules["torch"] = {stub}
from asgd_fast import *
import asgd_fast
print("ArrayASGD" in vars(), "ASGD" in vars(), hasattr(asgd_fast, "ASGD"), *asgd_fast.__all__)
"""
    said = said_by(code)
    assert said[:3] == ["True", "False", "False"]
    assert {"ArrayASGD", "show_config"} <= set(said[3:])
    assert "ASGD" not in said[3:]


@pytest.mark.skipif(not HAS_TORCH, reason="the integrations need torch")
def test_an_integration_without_its_framework_names_the_extra():
    code = "import sys; sys.modules['lightning'] = None; import asgd_fast.integrations.lightning"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stderr.splitlines()[-1] == (
        "ImportError: asgd_fast.integrations.lightning needs the packages of the lightning extra; "
        "in a clone of asgd_fast: pip install '.[lightning]'"
    )


@pytest.mark.skipif(not HAS_TORCH, reason="the integrations need torch")
def test_nothing_imports_the_integrations():
    assert said_by(
        "import sys, asgd_fast.optim; print('asgd_fast.integrations' in sys.modules)"
    ) == ["False"]


def test_a_clone_that_is_not_compiled_says_so(tmp_path):
    """As where the package is installed and Python started in the clone."""
    here = Path(asgd_fast.__file__).parent
    # An editable installation would lend its modules to the copy.
    site_packages = str(Path(np.__file__).parents[1])
    shutil.copytree(here, tmp_path / "asgd_fast", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    for arguments in (["-c", "import asgd_fast"], ["-m", "asgd_fast"]):
        result = subprocess.run(
            [sys.executable, "-S", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": site_packages},
        )
        assert result.returncode != 0
        assert f"asgd_fast was imported from {tmp_path / 'asgd_fast'}" in result.stderr
        assert "start Python in another folder" in result.stderr


def test_an_import_that_fails_elsewhere_says_where():
    code = "import sys; sys.modules['asgd_fast._schedule'] = None; import asgd_fast"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "import of asgd_fast._schedule halted" in result.stderr.splitlines()[-1]


def public_callables():
    for name in asgd_fast.__all__:
        if name != "ASGD" or HAS_TORCH:
            x = getattr(asgd_fast, name)
            if isinstance(x, type) and issubclass(x, Warning):  # its arguments are Python's
                continue
            yield name, x
            for method, function in inspect.getmembers(x) if isinstance(x, type) else ():
                is_public = method == "__init__" or not method.startswith("_")
                function = getattr(function, "fget", function)  # of a property
                is_own = str(getattr(function, "__module__", "")).startswith("asgd_fast.")
                if callable(function) and is_public and is_own:
                    yield f"{name}.{method}", function


@pytest.mark.parametrize(("name", "x"), [pytest.param(*p, id=p[0]) for p in public_callables()])
def test_type_hints_can_be_resolved(name, x):
    typing.get_type_hints(x)  # of a class, those of its attributes
    hints = typing.get_type_hints(x.__init__ if isinstance(x, type) else x)
    parameters = inspect.signature(x, eval_str=True).parameters.values()
    assert not [p for p in parameters if isinstance(p.annotation, str)]
    annotated = {p.name for p in parameters if p.annotation is not p.empty}
    assert annotated <= hints.keys()


def test_type_hints_of_arrays_do_without_torch():
    code = """
import sys, typing, asgd_fast
for x in (asgd_fast.asgd_, asgd_fast.ArrayASGD.__init__, asgd_fast.ArrayASGD.step):
    typing.get_type_hints(x)
print("torch" in sys.modules)
"""
    assert said_by(code) == ["False"]
