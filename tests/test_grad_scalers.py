"""Gradient scalers, and frameworks that have one: nothing may differ from torch.optim.ASGD.

Unless it is asked to, with fused_amp=True, the step knows nothing of scalers.
"""

from __future__ import annotations

import copy
import math
import pickle

import device_twins
import fake_cuda
import pytest
import torch
from torch import nn
from twins import Twins, parameters, same

from asgd_fast import ASGD

pytestmark = pytest.mark.usefixtures("seeded")

OPTIONS = {"lr": 0.1, "lambd": 1e-2, "t0": 2, "weight_decay": 0.01}
INFINITE = (0, 4, 9)


def scaler(device="cpu"):
    return torch.amp.GradScaler(device, init_scale=2.0**16, growth_interval=3)


class Scaled:
    """Both optimizers, each with a model's worth of params behind a scaler of its own."""

    def __init__(self, dtype=torch.float32, **options):
        self.twins = Twins(parameters((6,), (3, 4), dtype=dtype), **OPTIONS, **options)
        self.sides = [(scaler(), *side) for side in self.twins.sides]

    def backward(self, k):
        """Scaled gradients for both, with an infinity in some steps."""
        x = [torch.randn_like(p) for p in self.twins.params]
        factor = math.inf if k in INFINITE else 1.0
        for own, optimizer, params in self.sides:
            optimizer.zero_grad()
            loss = sum((p * y).square().sum() * factor for p, y in zip(params, x, strict=True))
            own.scale(loss).backward()

    def check(self):
        self.twins.check()
        for ours, theirs in zip(self.twins.params, self.twins.theirs_params, strict=True):
            same(ours.grad, theirs.grad)
        assert self.sides[0][0].get_scale() == self.sides[1][0].get_scale()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clips", [False, True], ids=["plain", "clipped"])
def test_params_state_and_gradients_after_the_step(dtype, clips):
    scaled = Scaled(dtype)
    for k in range(12):
        scaled.backward(k)
        for own, optimizer, params in scaled.sides:
            if clips:
                own.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, 0.5)
            own.step(optimizer)
            own.update()
        scaled.check()


def test_what_hooks_see_and_how_often():
    """A logger of norms, a hook that clips, and a counter."""
    seen = [], []
    scaled = Scaled()
    for (_, optimizer, params), log in zip(scaled.sides, seen, strict=True):
        optimizer.register_step_pre_hook(
            lambda *_, p=params, log=log: log.append(nn.utils.clip_grad_norm_(p, 0.5).item())
        )
        optimizer.register_step_post_hook(
            lambda *_, p=params, log=log: log.append(nn.utils.get_total_norm(p).item())
        )
    for k in range(12):
        scaled.backward(k)
        for own, optimizer, _ in scaled.sides:
            own.step(optimizer)
            own.update()
        scaled.check()
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2 * (12 - len(INFINITE))


def test_a_framework_sees_which_steps_were_skipped():
    """As accelerate: by whether the scaler has called the step that it put in place of it."""
    scaled = Scaled()
    skipped = [], []
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _, optimizer, _ in scaled.sides
    ]
    for k in range(12):
        scaled.backward(k)
        for (own, optimizer, _), scheduler, log in zip(
            scaled.sides, schedulers, skipped, strict=True
        ):
            step, calls = optimizer.step, []

            def patched(*args, step=step, calls=calls, **kwargs):
                calls.append(1)
                return step(*args, **kwargs)

            optimizer.step = patched
            own.step(optimizer, None)
            own.update()
            optimizer.step = step
            log.append(not calls)
            if calls:
                scheduler.step()
        scaled.check()
    assert skipped[0] == skipped[1] == [k in INFINITE for k in range(12)]


def test_frameworks_that_clip_are_not_told_of_fused_unscaling():
    """As Lightning asks, also where there is no scaler at all."""
    assert not getattr(ASGD(parameters((3,))), "_step_supports_amp_scaling", False)
    assert ASGD(parameters((3,)), fused_amp=True)._step_supports_amp_scaling


def test_attributes_of_a_scaler_mean_nothing_unless_asked_for():
    twins = Twins(parameters((6,), (3, 4)), **OPTIONS)
    twins.ours.grad_scale = torch.tensor(4.0)
    twins.ours.found_inf = torch.tensor(1.0)
    twins.run(3)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("by_hand", [False, True], ids=["keyword", "by hand"])
@pytest.mark.parametrize("fused", [False, True])
def test_copies_keep_the_setting(make_copy, by_hand, fused):
    optimizer = ASGD(parameters((3,)), fused_amp=fused != by_hand)
    if by_hand:
        optimizer._step_supports_amp_scaling = fused
    other = make_copy(optimizer)
    assert other._step_supports_amp_scaling is other.fused_amp is fused


def test_a_fused_step_leaves_the_gradients_scaled_and_is_called_always():
    twins = Twins(parameters((6,), (3, 4)), **OPTIONS)
    twins.ours.fused_amp = True
    calls = []
    twins.ours.register_step_post_hook(lambda *_: calls.append(1))
    scaled = Scaled.__new__(Scaled)
    scaled.twins, scaled.sides = twins, [(scaler(), *side) for side in twins.sides]
    for k in range(12):
        scaled.backward(k)
        scale = scaled.sides[0][0].get_scale()
        for own, optimizer, _ in scaled.sides:
            own.step(optimizer)
            own.update()
        twins.check()
        for ours, theirs in zip(twins.params, twins.theirs_params, strict=True):
            if k not in INFINITE:
                assert torch.equal(ours.grad, theirs.grad * scale)
    assert len(calls) == 12


def test_params_on_a_gpu(monkeypatch):
    """Whose memory is the host's: the scaler unscales and skips, and the host has the scalars."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with fake_cuda.installed(monkeypatch):
        twins = device_twins.Twins(device_twins.params_of((5, 3), (1000,)), **OPTIONS)
        ours, theirs = scaler("cuda"), scaler()
        for k in range(12):
            for p, q in zip(twins.params, twins.theirs_params, strict=True):
                q.grad = torch.randn_like(q) * (math.inf if k in INFINITE else ours.get_scale())
                p.grad = device_twins.on(q.grad, "cuda")
            for own in (ours, theirs):
                own.scale(torch.zeros((), device=own._device))  # makes its scale
            ours.step(twins.ours)
            theirs.step(twins.theirs)
            ours.update()
            theirs.update()
            twins.check()
            for p, q in zip(twins.params, twins.theirs_params, strict=True):
                device_twins.same(p.grad, q.grad)
        assert not twins.ours.state[twins.params[0]]["eta"].is_cuda
