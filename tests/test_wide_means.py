"""How exact averages are: wide ones are the means of their iterates, narrow ones stop moving."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from asgd_fast import ASGD, asgd_

pytestmark = pytest.mark.usefixtures("seeded")


def ulps_off(average, dtype, iterates):
    """How far averages, narrowed, are from the exact means, in ulps of the narrow dtype."""
    worst = 0
    for ax, column in zip(average, iterates.T, strict=True):
        mean = Fraction(math.fsum(column)) / len(column)  # the sum is rounded once
        ulp = Fraction(float(np.spacing(dtype(float(abs(mean))))))
        worst = max(worst, abs(Fraction(float(dtype(ax))) - mean) / ulp)
    return float(worst)


def means_of(iterates, *averages):
    """Let `asgd_` average iterates that are given, with eta and grads that leave them alone."""
    param = np.zeros_like(iterates[0])
    grad = np.zeros_like(param)
    params, grads = [param] + [param.copy() for _ in averages[1:]], [grad for _ in averages]
    for k, row in enumerate(iterates, start=1):
        for p in params:
            p[:] = row
        asgd_(params, grads, list(averages), eta=1.0, mu=1 / k, lambd=0.0)


DTYPE_PAIRS = [(np.float32, np.float64), (np.float16, np.float32), (np.float16, np.float64)]


def random_walk(steps, dtype):
    """Iterates about values of different sizes, as noisy as they are large."""
    rng = np.random.default_rng(0)
    middle = np.array([1.0, 0.7, -3.0, 1.5, -0.1])
    return (middle + rng.standard_normal((steps, 5))).astype(dtype)


@pytest.mark.heavy
@pytest.mark.parametrize(("steps", "narrow_off"), [(30_000, 1), (1_000_000, 10)])
@pytest.mark.parametrize(("dtype", "wide"), DTYPE_PAIRS, ids=str)
def test_a_wide_average_is_the_mean(dtype, wide, steps, narrow_off):
    iterates = random_walk(steps, dtype)
    averages = np.zeros(5, wide), np.zeros(5, dtype)
    means_of(iterates, *averages)
    assert ulps_off(averages[0], dtype, iterates) <= 1
    assert ulps_off(averages[1], dtype, iterates) > narrow_off


@pytest.mark.heavy
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_wide_average_of_bfloat16_moves_on(wide):
    """Through the optimizer, whose weights are rounded to float32."""
    steps = 100_000
    iterates = (torch.randn(steps, 5) + torch.tensor([1.0, 0.7, -3.0, 1.5, -0.4])).bfloat16()
    params = [nn.Parameter(torch.zeros(5).bfloat16()) for _ in range(2)]
    optimizers = [
        ASGD([p], lr=1.0, lambd=0.0, t0=-1, average_dtype=dtype)
        for p, dtype in zip(params, (wide, None), strict=True)
    ]
    for p in params:
        p.grad = torch.zeros_like(p)
    for row in iterates:
        for p, optimizer in zip(params, optimizers, strict=True):
            p.data.copy_(row)
            optimizer.step()
    mean = iterates.double().mean(dim=0)
    ulp = torch.exp2(torch.floor(torch.log2(mean.abs())) - 7)
    off = [
        ((optimizer.state[p]["ax"].bfloat16().double() - mean).abs() / ulp).max()
        for p, optimizer in zip(params, optimizers, strict=True)
    ]
    assert off[0] <= 1
    assert off[1] > 1


@pytest.mark.heavy
def test_a_wide_average_of_the_optimizer_is_the_mean():
    """Although its weights are rounded to float32."""
    iterates = random_walk(100_000, np.float32)
    p = nn.Parameter(torch.zeros(5))
    optimizer = ASGD([p], lr=1.0, lambd=0.0, t0=-1, average_dtype=torch.float64)
    p.grad = torch.zeros(5)
    for row in torch.tensor(iterates):
        p.data.copy_(row)
        optimizer.step()
    assert ulps_off(optimizer.state[p]["ax"].numpy(), np.float32, iterates) <= 1
