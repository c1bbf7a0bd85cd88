"""average_every: the average of each so many-th iterate, which the other steps leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from runs import OPTIONS, ArrayRun, lazy_or_eager, runs
from torch import nn
from twins import Twins, bits, parameters

from asgd_fast import ASGD, ArrayASGD

pytestmark = pytest.mark.usefixtures("seeded")

MUS = {
    (0, 1): [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7, 1 / 8],
    (0, 2): [1, 0, 1 / 2, 0, 1 / 3, 0, 1 / 4, 0],
    (0, 3): [1, 0, 0, 1 / 2, 0, 0, 1 / 3, 0],
    (2, 3): [1, 1, 1, 0, 0, 1 / 2, 0, 0],
    (-1, 4): [0, 0, 0, 1 / 2, 0, 0, 0, 1 / 3],
    (1.5, 2): [1, 1, 1, 0, 1 / 2, 0, 1 / 3, 0],
    (6, 100): [1, 1, 1, 1, 1, 1, 1, 0],
}


@pytest.mark.parametrize(("t0", "every"), MUS)
@pytest.mark.parametrize("kind", ["engine", "gappy", "arrays"])
def test_weights_computed_by_hand(double_scalars, kind, t0, every):
    """After each step, that of the next iterate."""
    data = torch.randn(5, 2)
    p = nn.Parameter(data[:, 0] if kind == "gappy" else data[:, 0].clone())
    make = ArrayASGD if kind == "arrays" else ASGD
    optimizer = make([p.detach()] if kind == "arrays" else [p], t0=t0, average_every=every)
    p.grad = torch.ones(5)
    for mu in MUS[t0, every]:
        if kind == "arrays":
            optimizer.step([p.grad])
            assert optimizer.state_dict()["mu"] == [mu]
        else:
            optimizer.step()
            assert optimizer.state[p]["mu"].item() == mu


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize(("t0", "first"), [(-1, 0), (0, 1), (4, 5), (2.5, 4), (0.25, 2)])
@lazy_or_eager
@runs
def test_the_mean_of_each_so_many_th(double_scalars, make, lazy, t0, first, every):
    run = make((3, 4), (5,), t0=t0, average_every=every, lazy_average=lazy)
    for k in range(first + 2 * every + 2):
        run.step()
        if k >= first:
            run.check(first, first, every=every)
    assert np.abs(run.average(0) - np.mean(run.iterates[0][first:], axis=0)).max() > 1e-3


@pytest.mark.parametrize("every", [2, 5])
@runs
def test_each_so_many_th_after_a_start_by_hand(double_scalars, make, every):
    """Of params at different steps, that skip some."""
    run = make((3,), (4,), (5,), average_every=every)
    for k in range(3):
        run.step(*([1, 2] if k else [2]))
    run.optimizer.start_averaging()
    for k in range(2 * every + 2):
        run.step(*([] if k % 2 else [1]))
        if k:
            run.check(3, 1, 0, every=every)


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_other_steps_leave_the_average_alone(simd_level, gappy, dtype, wide):
    """Its bits, whatever they are, its place and its version."""
    data = torch.randn(37, 2).to(dtype)
    p = nn.Parameter(data[:, 0] if gappy else data[:, 0].clone())
    optimizer = ASGD([p], t0=0, lr=0.3, average_every=4, average_dtype=wide)
    for k in range(1, 15):
        p.grad = torch.randn(37).to(dtype)
        if k < 3 or k % 4 == 2:  # iterates 2, 6, 10 and 14 are averaged
            optimizer.step()
            continue
        ax = optimizer.state[p]["ax"]
        kept = ax.detach().clone()
        ax.detach().fill_(math.nan)
        noted, version = bits(ax.detach()).clone(), ax._version
        before = p.detach().clone()
        optimizer.step()
        assert not torch.equal(p, before)
        assert optimizer.state[p]["ax"] is ax
        assert ax._version == version
        assert torch.equal(bits(ax.detach()), noted)
        ax.detach().copy_(kept)
    assert optimizer.state[p]["mu"].item() == 0
    assert torch.isfinite(torch.view_as_real(ax) if ax.is_complex() else ax).all()


def test_other_steps_leave_the_averages_of_arrays_alone():
    run = ArrayRun((3,), t0=0, average_every=4)
    for k in range(1, 15):
        if k < 3 or k % 4 == 2:
            run.step()
            continue
        (ax,) = run.optimizer.averages
        kept = ax.copy()
        ax[:] = math.nan
        run.step()
        assert np.isnan(ax).all()
        ax[:] = kept
    run.check(1, every=4)


@pytest.mark.parametrize("t0", [-5, 0, 2.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_each_iterate_has_the_bits_of_torch(dtype, t0):
    params = parameters((3,), (40, 5), dtype=dtype)
    twins = Twins(params, **OPTIONS, t0=t0)
    twins.ours.param_groups[0]["average_every"] = np.int64(1)
    twins.run(12)
