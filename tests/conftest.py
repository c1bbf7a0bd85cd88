"""Fixtures of more than one test module."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress

import numpy as np
import pytest

from asgd_fast import _core, get_num_threads, set_num_threads

with suppress(ModuleNotFoundError):  # on Pythons that are tested without
    import torch


@pytest.fixture
def seeded():
    """Random numbers of torch's default generator that are the same in each run."""
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """Two threads for the steps, however many processors there are."""
    before = get_num_threads()
    set_num_threads(2)
    assert get_num_threads() == 2
    yield
    set_num_threads(before)


@pytest.fixture(params=_core.simd_levels())
def simd_level(request):
    """Each SIMD level that this machine has, in turn."""
    best = _core.simd_level()
    _core.use_simd_level(request.param)
    yield request.param
    _core.use_simd_level(best)


@pytest.fixture
def double_scalars():
    """Let torch keep eta and mu in double, as the arrays' API does."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _savez(state, folder):
    np.savez(folder / "state.npz", **state)
    return np.load(folder / "state.npz")


@pytest.fixture(
    params=[
        lambda state, _: state,
        lambda state, _: copy.deepcopy(state),
        lambda state, _: pickle.loads(pickle.dumps(state)),
        _savez,
    ],
    ids=["dict", "deepcopy", "pickle", "savez"],
)
def through(request, tmp_path):
    """Pass a state through one of the ways in which it may be saved."""
    return lambda state: request.param(state, tmp_path)
