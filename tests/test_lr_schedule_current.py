"""lr_schedule="current": an eta that follows lr at once, and plain SGD before averaging."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from averaging import asks_early
from runs import lazy_or_eager, with_lr
from torch import nn
from twins import Twins, bits, parameters, same

from asgd_fast import ASGD, ArrayASGD

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}], ids=str
)
@pytest.mark.parametrize("t0", [1e6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@lazy_or_eager
def test_the_bits_of_sgd_before_averaging(simd_level, dtype, t0, options, lazy):
    """With an lr that changes in each step."""
    shapes = (3,), (40, 5), (), (1000,)
    params, others = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=dtype)
    for own in (params, others):  # and one that goes to torch
        generator = torch.Generator().manual_seed(1)
        own.append(nn.Parameter(torch.randn(6, 4, generator=generator).to(dtype)[:, ::2]))
    ours = ASGD(
        params, lr=9.0, lambd=0.1, t0=t0, lr_schedule="current", lazy_average=lazy, **options
    )
    theirs = torch.optim.SGD(others, lr=9.0, foreach=False, **options)
    for k in range(13):
        for optimizer in (ours, theirs):
            with_lr(optimizer, 0.1 / (k + 1) + 1e-3)
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        for p, q in zip(params, others, strict=True):
            same(p, q)


def reference_step(
    p, ax, grad, k, *, lr, lambd, alpha, t0, weight_decay=0.0, maximize=False, every=1
):
    """The documented step that follows k steps, in torch's operations; returns the new mu."""
    grad = -grad if maximize else grad
    if weight_decay != 0:
        grad = grad.add(p, alpha=weight_decay)
    eta = lr
    if k > t0:
        eta = lr / (1 + lambd * lr * (k - t0)) ** alpha
        p.mul_(1 - lambd * eta)
    p.add_(grad, alpha=-eta)
    number = k + 1 - (math.ceil(t0) + 2)  # of iterates since the first in the average
    if every == 1:
        mu = torch.tensor(1 / max(1, k - t0))
    else:
        mu = torch.tensor(1 / (number / every + 1) if number > 0 and number % every == 0 else 0.0)
    if number <= 0 and (every > 1 or k - t0 <= 1):
        ax.copy_(p)
    elif mu != 0:
        ax.add_(p.sub(ax).mul_(mu))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("alpha", [0.75, 0.0, 1.0])
@pytest.mark.parametrize("t0", [0, 3, 2.5, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_the_documented_formula_after_averaging_has_begun(gappy, dtype, t0, alpha, every):
    data = torch.randn(4, 6, dtype=dtype)
    p = nn.Parameter(data[:, ::2] if gappy else data[:, ::2].clone())
    options = {"lambd": 0.1, "alpha": alpha, "t0": t0, "weight_decay": 0.05, "maximize": True}
    q, ax = p.detach().clone(), torch.zeros(4, 3, dtype=dtype)
    optimizer = ASGD([p], lr=9.0, lr_schedule="current", average_every=every, **options)
    for k in range(15):
        lr = 0.3 + 0.1 * (k % 4)
        with_lr(optimizer, lr)
        p.grad = torch.randn(4, 3, dtype=dtype)
        reference_step(q, ax, p.grad, k, lr=lr, every=every, **options)
        optimizer.step()
        assert torch.equal(bits(p.detach()), bits(q))
        assert torch.equal(bits(optimizer.state[p]["ax"].detach()), bits(ax))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("t0", [0, 3, 2.5, -1])
@asks_early
def test_the_documented_formula_for_arrays(double_scalars, t0, every):
    x = np.random.default_rng(0).standard_normal((4, 3))
    options = {"lambd": 0.1, "alpha": 0.75, "t0": t0, "weight_decay": 0.05}
    optimizer = ArrayASGD(x, lr=9.0, lr_schedule="current", average_every=every, **options)
    q, ax = torch.tensor(x), torch.zeros(4, 3)
    for k in range(15):
        lr = 0.3 + 0.1 * (k % 4)
        with_lr(optimizer, lr)
        grad = torch.randn(4, 3)
        reference_step(q, ax, grad, k, lr=lr, every=every, **options)
        optimizer.step(grad.numpy())
        assert np.array_equal(x, q.numpy())
        assert np.array_equal(optimizer.averages[0], ax.numpy())


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.3),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.5, total_steps=12, cycle_momentum=False
    ),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
}


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.3)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_act_at_once(make, lr):
    params, others = parameters((3,), (4, 5)), parameters((3,), (4, 5))
    ours = ASGD(params, lr=copy.deepcopy(lr), lr_schedule="current")
    theirs = torch.optim.SGD(others, lr=copy.deepcopy(lr), foreach=False)
    schedulers = [make(ours), make(theirs)]
    for _ in range(10):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        for p, q in zip(params, others, strict=True):
            same(p, q)


def test_by_default_a_change_acts_one_step_late():
    """As in torch: what the other schedule is for."""
    twins = Twins(parameters((3,)), lr=0.5, lambd=0.0)
    twins.run(1)
    for optimizer in (twins.ours, twins.theirs):
        with_lr(optimizer, 0.125)
    before = twins.params[0].detach().clone()
    twins.step([torch.ones(3)])
    assert torch.equal(twins.params[0], before - 0.5)
    twins.check()


@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_schedules_changed_between_steps(gappy):
    """To the other one and back: eta of the next step is the one that the new schedule gives."""
    data = torch.zeros(3, 2, dtype=torch.float64)
    p = nn.Parameter(data[:, 0] if gappy else data[:, 0].clone())
    optimizer = ASGD([p], lr=0.5, lambd=0.0)
    p.grad = torch.ones(3, dtype=torch.float64)
    (group,) = optimizer.param_groups
    moved = []
    for schedule, lr in (
        ("torch", 0.5),
        ("current", 0.25),
        ("current", 0.125),
        ("torch", 1.0),
        ("torch", 1.0),
    ):
        group["lr_schedule"], group["lr"] = schedule, lr
        before = p.detach().clone()
        optimizer.step()
        moved.append((before - p.detach())[0].item())
    assert moved == [0.5, 0.25, 0.125, 0.125, 1.0]
