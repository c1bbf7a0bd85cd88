"""The array face as it is where there is no torch: `make test-pythons` runs this on each Python.

Here each test runs a program in a process of its own, in which torch cannot be imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from asgd_fast import _core


def run(program, **environment):
    """What a program without torch prints, as words."""
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


HEAD = """
import sys
sys.modules["torch"] = None
import copy, io, pickle
import numpy as np
from asgd_fast import ArrayASGD, NonMonotonicTrigger, asgd_, set_num_threads, get_num_threads
rng = np.random.default_rng(0)
"""


@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_bits_of_exact_arithmetic(dtype, level):
    program = f"""
    from oracle import exact_step
    dtype = np.{dtype}
    for options in (
        dict(eta=0.1, mu=1.0, lambd=1e-4, weight_decay=0.0, maximize=False, grad_scale=None),
        dict(eta=0.3, mu=0.2, lambd=0.5, weight_decay=0.7, maximize=True, grad_scale=0.125),
    ):
        for n in (1, 15, 67):
            p, g, ax = (rng.normal(size=n).astype(dtype) for _ in range(3))
            wanted = [exact_step(*x, dtype, **options) for x in zip(p, g, ax)]
            asgd_(p, g, ax, **options)
            assert [(x, y) for x, y in zip(p, ax)] == wanted
    print("done")
    """
    assert run(program, ASGD_FAST_SIMD=level) == ["done"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
def test_averages_are_the_means_of_the_iterates(dtype):
    program = f"""
    param = np.ones(50, np.{dtype})
    optimizer = ArrayASGD(param, lr=0.01, lambd=0.0, t0=5, average_dtype=np.float64)
    iterates = []
    for _ in range(20):
        optimizer.step(rng.normal(size=50).astype(param.dtype))
        iterates.append(param.copy())
    average = optimizer.averages[0].copy()
    mean = np.mean([x.astype(average.dtype) for x in iterates[6:]], axis=0)
    assert np.allclose(average, mean, rtol=1e-14, atol=1e-14)
    with optimizer.averaged_parameters():
        assert (param == average.astype(param.dtype)).all()
    assert (param == iterates[-1]).all()
    print("done")
    """
    assert run(program) == ["done"]


@pytest.mark.parametrize(
    "way",
    [
        "copy.deepcopy(state)",
        "pickle.loads(pickle.dumps(state))",
        "(np.savez(file, **state), file.seek(0), np.load(file))[2]",
    ],
)
def test_a_run_goes_on_from_a_saved_state(way):
    program = f"""
    def made(params):
        return ArrayASGD(params, lr=0.1, t0=2)
    params = [rng.normal(size=n) for n in (3, 70_000)]
    others = copy.deepcopy(params)
    grads = [[rng.normal(size=x.size) for x in params] for _ in range(8)]
    whole = made(params)
    for g in grads:
        whole.step(g)
    part = made(others)
    for g in grads[:5]:
        part.step(g)
    state, file = part.state_dict(), io.BytesIO()
    rest = made(others)
    rest.load_state_dict({way})
    for g in grads[5:]:
        rest.step(g)
    assert all((x == y).all() for x, y in zip(params, others))
    assert all((x == y).all() for x, y in zip(whole.averages, rest.averages))
    print("done")
    """
    assert run(program) == ["done"]


def test_threads_change_no_bit():
    program = """
    p, g, ax = (rng.normal(size=1 << 21) for _ in range(3))
    results = []
    for n in (1, 4):
        set_num_threads(n)
        assert get_num_threads() == n
        arrays = [p.copy(), g, ax.copy()]
        asgd_(*arrays, eta=0.1, mu=0.3)
        results.append(arrays)
    assert all((x == y).all() for x, y in zip(*results))
    print("done")
    """
    assert run(program) == ["done"]


def test_a_trigger_starts_the_averages():
    program = """
    optimizer = ArrayASGD([np.zeros(3)], lr=0.1)
    trigger = NonMonotonicTrigger(optimizer, patience=0)
    for loss in (2.0, 1.0, 1.5):
        optimizer.step(rng.normal(size=3))
        print(trigger.step(np.float32(loss)))
    """
    assert run(program) == ["False", "False", "True"]
