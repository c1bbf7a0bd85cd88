"""Wrappers of frameworks that imitate the optimizer's class: they and it are one optimizer."""

from __future__ import annotations

import pytest
import torch
from averaging import saves_inside
from twins import parameters

from asgd_fast import ASGD

pytestmark = pytest.mark.usefixtures("seeded")


def looked_up(optimizer):
    """As Lightning and its Fabric make them: what the wrapper lacks is the optimizer's."""

    class Wrapper:
        def __init__(self):
            self._optimizer = optimizer
            bases = (self.__class__, optimizer.__class__)
            self.__class__ = type("Wrapped" + optimizer.__class__.__name__, bases, {})

        def step(self, closure=None):
            return self._optimizer.step(closure)

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

    return Wrapper()


def copied(optimizer):
    """As Lightning made them before 2.2: with a copy of the optimizer's attributes."""

    class Wrapper:
        def __init__(self):
            self.__dict__ = {k: v for k, v in vars(optimizer).items() if k not in ("step",)}
            bases = (self.__class__, optimizer.__class__)
            self.__class__ = type("Wrapped" + optimizer.__class__.__name__, bases, {})
            self._optimizer = optimizer

        def step(self, closure=None):
            return self._optimizer.step(closure)

    return Wrapper()


wrappers = pytest.mark.parametrize("wrapped", [looked_up, copied])

SETTINGS = {"lazy_average": False, "average_dtype": torch.float64, "fused_amp": True}


def stepped(optimizer, params, steps=1):
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()


@wrappers
def test_a_wrapper_has_the_settings(wrapped):
    optimizer = ASGD(parameters((3,)), **SETTINGS)
    wrapper = wrapped(optimizer)
    assert {name: getattr(wrapper, name) for name in SETTINGS} == SETTINGS
    assert wrapper._step_supports_amp_scaling
    assert repr(wrapper).split("(", 1)[1] == repr(optimizer).split("(", 1)[1]


@wrappers
@pytest.mark.parametrize("through", ["wrapper", "optimizer"])
def test_settings_that_change_change_for_both(wrapped, through):
    optimizer = ASGD(parameters((3,)))
    wrapper = wrapped(optimizer)
    for name, value in SETTINGS.items():
        setattr(wrapper if through == "wrapper" else optimizer, name, value)
        assert getattr(wrapper, name) == getattr(optimizer, name) == value


@saves_inside
@wrappers
@pytest.mark.parametrize("entered", ["wrapper", "optimizer"])
def test_both_refuse_what_is_refused_inside_averaged_parameters(wrapped, entered):
    params = parameters((3,))
    optimizer = ASGD(params, lr=0.1, t0=0)
    wrapper = wrapped(optimizer)
    stepped(wrapper, params, 4)
    iterate, average = params[0].detach().clone(), optimizer.state[params[0]]["ax"].clone()
    calls = {
        "step": lambda own: own.step(),
        "averaged_parameters": lambda own: own.averaged_parameters().__enter__(),
        "start_averaging": lambda own: own.start_averaging(),
        "load_state_dict": lambda own: own.load_state_dict(own.state_dict()),
    }
    with (wrapper if entered == "wrapper" else optimizer).averaged_parameters():
        assert torch.equal(params[0], average)
        for own in (wrapper, optimizer):
            for name, call in calls.items():
                with pytest.raises(RuntimeError, match=f"^{name}: "):
                    call(own)
    assert torch.equal(params[0], iterate)
    stepped(wrapper, params)


@wrappers
@pytest.mark.parametrize("lazy", [False, True])
def test_averages_begun_through_a_wrapper_are_those_of_the_optimizer(wrapped, lazy):
    """By which of the two they are begun makes no difference, nor does a state made before."""
    results = []
    for pick in (lambda _, optimizer: optimizer, lambda wrapper, _: wrapper):
        torch.manual_seed(0)
        params = parameters((3,), (4, 2), dtype=torch.float32)
        optimizer = ASGD(params, lr=0.1, average_dtype=torch.float64, lazy_average=lazy)
        own = pick(wrapped(optimizer), optimizer)
        stepped(own, params, 3)
        own.start_averaging()
        stepped(own, params, 1)
        assert lazy or all("ax" in entry for entry in optimizer.state.values())
        stepped(own, params, 4)
        targets = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
        own.copy_averages_to(targets)
        results.append([*params, *targets, *(entry["ax"] for entry in optimizer.state.values())])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@wrappers
def test_a_group_added_through_a_wrapper_has_the_optimizers_defaults(wrapped):
    optimizer = ASGD(parameters((3,)), lr_schedule="current", average_every=3)
    wrapped(optimizer).add_param_group({"params": parameters((4,))})
    assert [group["average_every"] for group in optimizer.param_groups] == [3, 3]
    assert [group["lr_schedule"] for group in optimizer.param_groups] == ["current", "current"]


@wrappers
def test_checkpoints_through_a_wrapper(wrapped):
    params = parameters((3,))
    optimizer = ASGD(params, lr=0.1, t0=0, average_dtype=torch.float64)
    stepped(optimizer, params, 4)
    one, other = wrapped(optimizer).state_dict(), optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert list(one["state"][0]) == list(other["state"][0]) == ["step", "eta", "mu", "ax"]
    assert all(torch.equal(x, other["state"][0][name]) for name, x in one["state"][0].items())
