"""ASGD as torch's programs use it: construction, closures, hooks, scalers, compilation."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from runs import steps_made_by_threads
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
from twins import NAMES, Twins, entries_of, parameters, same, sealed_or_open

import asgd_fast
from asgd_fast import ASGD

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.ASGD)
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


def test_it_is_a_torch_asgd_with_its_signature():
    assert issubclass(ASGD, torch.optim.ASGD)
    ours, theirs = inspect.signature(ASGD), inspect.signature(torch.optim.ASGD)
    own = ["lazy_average", "average_dtype", "lr_schedule", "average_every", "averaging"]
    own.append("fused_amp")
    assert list(ours.parameters) == [*theirs.parameters, *own]
    for name in own:
        assert ours.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default
        assert ours.parameters[name].kind == parameter.kind
    params = parameters((3,))
    ours, theirs = ASGD(params), torch.optim.ASGD(params)
    own = {"lr_schedule": "torch", "average_every": 1, "averaging": "mean"}
    defaults = {**theirs.defaults, **own}
    assert ours.defaults == defaults
    assert ours.param_groups == theirs.param_groups
    assert repr(ours) == repr(theirs)
    unusual = {
        "average_every": 3,
        "average_dtype": torch.float64,
        "fused_amp": True,
        "lazy_average": False,
    }
    lines = [line.strip() for line in repr(ASGD(params, **unusual)).splitlines()]
    assert {f"{name}: {value}" for name, value in unusual.items()} <= set(lines)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.optimizer_error_input.desc)
def test_torchs_own_error_inputs(error):
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = parameters((2, 3)) if given.params is None else given.params
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            ASGD(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            ASGD(params, **given.kwargs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambd": -1}, ValueError, "Invalid lambd value: -1"),
        ({"lambd": math.nan}, ValueError, "Invalid lambd value: nan"),
        ({"lambd": math.inf}, ValueError, "Invalid lambd value: inf"),
        ({"alpha": -0.5}, ValueError, "Invalid alpha value: -0.5"),
        ({"alpha": math.inf}, ValueError, "Invalid alpha value: inf"),
        ({"t0": math.nan}, ValueError, "Invalid t0 value: nan"),
        ({"t0": math.inf}, ValueError, "Invalid t0 value: inf"),
        ({"lambd": "much"}, TypeError, "expected a real number, got 'much'|not supported between"),
        ({"t0": "late"}, TypeError, "t0: expected a real number, got 'late'"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ASGD(parameters((3,)), **options)
    if "lr" not in options:
        optimizer = ASGD(parameters((3,)))
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": parameters((4,)), **options})
        assert len(optimizer.param_groups) == 1


@sealed_or_open
@pytest.mark.parametrize("options", [{"lambd": -1}, {"alpha": math.nan}, {"t0": math.inf}], ids=str)
def test_hyperparameters_changed_to_what_is_refused_change_nothing(options, looks):
    twins = Twins(parameters((3,), (4,)), lambda own: [{"params": p} for p in own], looks=looks)
    twins.run(2)
    twins.ours.param_groups[1].update(options)
    twins.set_grads(twins.random_grads())
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))} value"):
        twins.ours.step()
    twins.check()


@sealed_or_open
@pytest.mark.parametrize("alpha", [0, 1])
def test_an_lr_below_zero_is_taken_as_long_as_eta_has_a_value(alpha, looks):
    twins = Twins(parameters((3,)), looks=looks, lambd=1.0, alpha=alpha)
    twins.run(2)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = -2.0
    twins.run(2)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_hyperparameter_that_is_no_number_is_named(name):
    (p,) = parameters((3,))
    optimizer = ASGD([p])
    p.grad = torch.ones(3)
    optimizer.param_groups[0][name] = "x"
    with pytest.raises(TypeError, match=f"{name}: expected a real number, got 'x'"):
        optimizer.step()


def test_groups_that_torch_steps_are_checked_too():
    (p,) = parameters((3,))
    optimizer = ASGD([p], differentiable=True)
    p.grad = torch.ones(3)
    optimizer.param_groups[0]["lambd"] = -1
    with pytest.raises(ValueError, match="Invalid lambd value: -1"):
        optimizer.step()


@sealed_or_open
def test_a_group_that_becomes_differentiable(looks):
    twins = Twins([torch.randn(3, requires_grad=True)], looks=looks, lr=0.1)
    twins.run(2)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["differentiable"] = True
    twins.run(2)


def test_functional_transforms_refuse_what_they_refuse_of_torch():
    for optimizer_type in (torch.optim.ASGD, ASGD):
        (p,) = parameters((3,))
        optimizer = optimizer_type([p])
        p.grad = torch.ones(3)

        def through(x, optimizer=optimizer):
            optimizer.step()
            return x.sum()

        with pytest.raises(RuntimeError):
            torch.func.grad(through)(torch.ones(3))


def test_an_lr_that_leaves_eta_without_a_value_is_refused():
    (p,) = parameters((3,))
    optimizer = ASGD([p], lambd=1.0)
    optimizer.param_groups[0]["lr"] = -2.0
    p.grad = torch.ones(3)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"Invalid learning rate: -2.0 \(1 \+ lambd \* lr \* step"):
        optimizer.step()
    same(p, before)


def test_the_closure_is_called_with_grad_and_its_loss_returned():
    (p,) = parameters((3,))
    optimizer = ASGD([p], lr=0.1, lambd=0.0)
    before = p.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad
    assert torch.equal(loss, before.sum())
    assert torch.equal(p, before - 0.1)
    assert optimizer.step() is None


HOOKS = {
    "pre": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "post": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    "global pre": lambda _, hook: register_optimizer_step_pre_hook(hook),
    "global post": lambda _, hook: register_optimizer_step_post_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_each_kind_of_hook_alone(register):
    (p,) = parameters((3,))
    optimizer = ASGD([p])
    p.grad = torch.ones(3)
    calls = []
    handle = register(optimizer, lambda *given: calls.append(given))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert calls == [(optimizer, (optimizer,), {})]


@pytest.mark.parametrize("passed", ["by place", "by name"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_hook_that_a_closure_registers(register, passed):
    """Those for after the step are called after the same step."""
    calls = {}
    for optimizer_type in (ASGD, torch.optim.ASGD):
        (p,) = parameters((3,))
        p.grad = torch.ones(3)
        optimizer, own, handles = optimizer_type([p]), [], []

        def closure(optimizer=optimizer, own=own, handles=handles):
            def hook(given, args, kwargs):
                own.append((given is optimizer, len(args), list(kwargs)))

            handles.append(register(optimizer, hook))

        for _ in range(2):
            optimizer.step(closure) if passed == "by place" else optimizer.step(closure=closure)
        for handle in handles:
            handle.remove()
        calls[optimizer_type] = own
    assert calls[ASGD] == calls[torch.optim.ASGD] != []


def test_the_profiler_range_without_hooks():
    (p,) = parameters((3,))
    optimizer = ASGD([p])
    p.grad = torch.ones(3)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert [e.count for e in profile.key_averages() if e.key == "Optimizer.step#ASGD.step"] == [1]


def test_hooks_and_profiler_range():
    (p,) = parameters((3,))
    optimizer = ASGD([p])
    calls = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
    optimizer.register_step_post_hook(
        lambda o, a, k: calls.append(("post", int(o.state[p]["step"])))
    )
    handle = register_optimizer_step_post_hook(lambda o, a, k: calls.append("global"))
    p.grad = torch.ones(3)
    try:
        with torch.profiler.profile() as profile:
            optimizer.step()
    finally:
        handle.remove()
    assert calls == ["pre", ("post", 1), "global"]
    assert any(e.key == "Optimizer.step#ASGD.step" for e in profile.key_averages())


def test_zero_grad():
    params = parameters((3,), (4,))
    optimizer = ASGD(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_differentiable_steps_pass_gradients_on():
    def learn(optimizer_type):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        start = torch.linspace(1, 2, 4, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        p.retain_grad()
        optimizer = optimizer_type([p], lr=lr, differentiable=True)
        for _ in range(3):
            p.grad = 2 * start
            optimizer.step()
        p.sum().backward()
        return start.grad, lr.grad

    for ours, theirs in zip(learn(ASGD), learn(torch.optim.ASGD), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert learn(ASGD)[0] is not None


def test_capturable_on_the_cpu_is_refused_as_by_torch():
    for optimizer_type in (ASGD, torch.optim.ASGD):
        (p,) = parameters((3,))
        optimizer = optimizer_type([p], capturable=True)
        p.grad = torch.ones(3)
        with pytest.raises(AssertionError, match="If capturable=True, params"):
            optimizer.step()


def test_foreach_has_the_bits_of_the_loop():
    twins = Twins(parameters((3,), (4, 2)), lambd=0.1)
    twins.ours.param_groups[0]["foreach"] = True
    twins.run(5)


class Scaled:
    """Both optimizers, each behind a GradScaler of its own."""

    def __init__(self, dtype=torch.float32, *, fused=True, **options):
        options = {"lr": 0.1, "lambd": 1e-2, "t0": 2, "weight_decay": 0.01, **options}
        self.twins = Twins(parameters((6,), (3, 4), dtype=dtype), **options)
        self.twins.ours._step_supports_amp_scaling = fused
        self.scalers = [
            torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3) for _ in range(2)
        ]

    def step(self, factor=1.0, *, unscale_first=False):
        twins = self.twins
        x = [torch.randn_like(p) for p in twins.params]
        both = twins.sides
        for scaler, (optimizer, own) in zip(self.scalers, both, strict=True):
            optimizer.zero_grad()
            loss = sum((p * y).square().sum() * factor for p, y in zip(own, x, strict=True))
            scaler.scale(loss).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(own, 0.5)
            scaler.step(optimizer)
            scaler.update()
        twins.check()
        assert self.scalers[0].get_scale() == self.scalers[1].get_scale()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@sealed_or_open
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("unscale_first", [False, True], ids=["as it is", "unscaled first"])
def test_a_grad_scaler_with_planted_infinities(dtype, fused, unscale_first, looks):
    scaled = Scaled(dtype, fused=fused, looks=looks)
    for k in range(12):
        before = [x.clone() for x in snapshot(scaled.twins)]
        scaled.step(math.inf if k in (0, 4, 9) else 1.0, unscale_first=unscale_first)
        if k in (4, 9):
            for x, y in zip(snapshot(scaled.twins), before, strict=True):
                assert torch.equal(x, y)
        assert not hasattr(scaled.twins.ours, "found_inf")
    assert scaled.twins.ours.state[scaled.twins.params[0]]["step"] == 9


def snapshot(twins):
    entries = entries_of(twins.ours)
    tensors = [*twins.params, *(x for entry in entries.values() for x in entry.values())]
    return [x.detach() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_scale_that_is_no_power_of_two(dtype):
    scaled = Scaled(dtype)
    scaled.step()
    for scaler in scaled.scalers:
        scaler.update(new_scale=3.3)
    for _ in range(5):
        scaled.step()


def test_unscaling_does_not_write_the_gradients():
    scaled = Scaled()
    scaled.step()
    ours, theirs = scaled.twins.params[0].grad, scaled.twins.theirs_params[0].grad
    assert torch.equal(ours / 2.0**12, theirs)


def test_unscaling_where_torchs_function_steps():
    twins = Twins([nn.Parameter(torch.randn(10)[::2]), *parameters((4,))], lr=0.1, lambd=0.1)
    twins.ours.fused_amp = True
    twins.ours.grad_scale = torch.tensor(4.0)
    twins.ours.found_inf = torch.tensor(0.0)
    for _ in range(4):
        grads = [torch.randn_like(p) for p in twins.params]
        twins.set_grads(grads)
        for p in twins.params:
            p.grad = p.grad * 4.0
        twins.ours.step()
        twins.theirs.step()
        for p, q in zip(twins.params, twins.theirs_params, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(twins.ours.state[p]["ax"], twins.theirs.state[q]["ax"])


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("what", ["model", "step", "all"])
def test_torch_compile(what):
    def train(optimizer_type, compile_, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = optimizer_type(model.parameters(), lr=0.1, lambd=0.1, t0=2, **options)
        forward = torch.compile(model, backend="eager") if compile_ == "model" else model
        step = (
            torch.compile(optimizer.step, backend="eager") if compile_ == "step" else optimizer.step
        )

        def once(x):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            step()

        if compile_ == "all":
            once = torch.compile(once, backend="eager")
        for _ in range(6):
            once(torch.randn(8, 4))
        state = [optimizer.state[p][name] for p in model.parameters() for name in NAMES]
        return [*model.parameters(), *state]

    try:
        ours = train(ASGD, what)
    finally:
        torch._dynamo.reset()
    for one, other in zip(ours, train(torch.optim.ASGD, None, foreach=False), strict=True):
        same(one, other)


def test_a_subclass_keeps_the_step():
    class Loud(ASGD):
        def step(self, closure=None):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    calls = []
    (p,) = parameters((3,))
    optimizer = Loud([p])
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.steps == 1
    assert optimizer.state[p]["step"] == 1


def test_optimizers_in_several_threads():
    def train(seed, out):
        torch.manual_seed(seed)
        twins = Twins(parameters(*[(50,)] * 20, seed=seed), lr=0.1, lambd=1e-2, t0=3)
        grads = [torch.randn(50) for _ in twins.params]
        for _ in range(50):
            twins.step(grads)
        twins.check()
        out.append(seed)

    done = []
    threads = [threading.Thread(target=train, args=(seed, done)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


def test_a_step_that_comes_into_another_threads_is_refused_rather_than_lost():
    """Those that are made are counted, and move the params."""
    p = nn.Parameter(torch.zeros(300_000))
    optimizer = ASGD([p], lr=1.0, lambd=0.0)
    p.grad = torch.ones_like(p)
    made = steps_made_by_threads(optimizer.step)
    assert optimizer.state[p]["step"] == made
    assert torch.equal(p, torch.full_like(p, -made))


def test_a_step_after_one_that_failed():
    (p,) = parameters((3,))
    optimizer = ASGD([p])
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_closure_that_makes_a_step_itself():
    twins = Twins(parameters((3,), (4,)), lr=0.1, t0=1)
    for k in range(6):
        grads = twins.random_grads()
        twins.set_grads(grads)
        for optimizer, _ in twins.sides:
            assert optimizer.step(lambda o=optimizer, k=k: (o.step(), k)[1]) == k
        twins.check()


def test_nothing_is_warned_of_with_an_lr_that_requires_grad():
    (p,) = parameters((3,))
    optimizer = ASGD([p], lr=torch.tensor(0.1, requires_grad=True))
    p.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.step()
    assert not optimizer.state[p]["eta"].requires_grad


def test_the_array_interface_does_without_torch():
    code = "import sys, asgd_fast; assert 'torch' not in sys.modules; print(asgd_fast.ASGD)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "<class 'asgd_fast.optim.ASGD'>\n"


def test_without_torch_the_error_says_so():
    code = "import sys; sys.modules['torch'] = None; from asgd_fast import ASGD"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "ImportError" in result.stderr
    assert "asgd_fast.ASGD needs torch" in result.stderr


def test_the_public_names_are_all_there():
    assert "ASGD" in dir(asgd_fast)
    assert all(hasattr(asgd_fast, name) for name in asgd_fast.__all__)
