"""Every public method inside compiled functions, against the same without the compiler."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from twins import entries_of, parameters, same

from asgd_fast import ASGD, ArrayASGD, NonMonotonicTrigger, asgd_

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler
]

OPTIONS = {"lr": 0.1, "lambd": 0.01, "t0": 1}


@pytest.fixture(autouse=True)
def without_traces():
    yield
    torch._dynamo.reset()


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, 0.5)
    optimizer.step()


def with_closure(optimizer):
    (p, *_) = optimizer.param_groups[0]["params"]

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def change_lr(optimizer):
    optimizer.param_groups[0]["lr"] = 0.5
    step(optimizer)
    return optimizer.param_groups[0]["capturable"]


def construct(optimizer):
    other = ASGD(optimizer.param_groups[0]["params"], average_dtype=torch.float64, **OPTIONS)
    for _ in range(4):
        step(other)
    return str(other), [x for entry in other.state.values() for x in entry.values()]


def deep_copy(optimizer):
    other = copy.deepcopy(optimizer)
    step(other)
    return str(other), [p.detach() for p in other.param_groups[0]["params"]]


def pickled(optimizer):
    other = pickle.loads(pickle.dumps(optimizer))
    step(other)
    return str(other), [p.detach() for p in other.param_groups[0]["params"]]


def save_and_load(optimizer):
    saved = optimizer.state_dict()
    step(optimizer)
    optimizer.load_state_dict(saved)
    step(optimizer)


def averaged(optimizer):
    with optimizer.averaged_parameters():
        return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


def copied_averages(optimizer):
    targets = [torch.zeros_like(p) for p in optimizer.param_groups[0]["params"]]
    optimizer.copy_averages_to(targets)
    return targets


def averaged_model(optimizer):
    model = torch.nn.ParameterList(optimizer.param_groups[0]["params"])
    return list(optimizer.averaged_state_dict(model).values())


def start(optimizer):
    optimizer.start_averaging()
    step(optimizer)
    step(optimizer)


def reset(optimizer):
    optimizer.reset_averages(0)
    step(optimizer)


def trigger(optimizer):
    one = NonMonotonicTrigger(optimizer, patience=1)
    for loss in (1.0, 2.0, 3.0, 4.0):
        one.step(loss)
        step(optimizer)


def add_group(optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3})
    step(optimizer)


def schedule(optimizer):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        step(optimizer)
        scheduler.step()
    return optimizer.param_groups[0]["lr"]


def hooks(optimizer):
    calls = []
    handle = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step(optimizer)
    handle.remove()
    step(optimizer)
    return len(calls)


def asked(optimizer):
    return optimizer.is_averaging, [average.clone() for average in optimizer.averages]


def zero_grad(optimizer):
    step(optimizer)
    optimizer.zero_grad(set_to_none=False)
    grads = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.zero_grad()
    return grads, [p.grad for p in optimizer.param_groups[0]["params"]]


def other_hooks(optimizer):
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("step")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save")),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]
    step(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    return calls


def own_weights(optimizer):
    options = {"average_every": 2, "averaging": ("ema", 0.9), "lr_schedule": "current"}
    other = ASGD(optimizer.param_groups[0]["params"], **OPTIONS, **options)
    for _ in range(6):
        step(other)
    return str(other), [[*entry.values()] for entry in entries_of(other).values()]


def batch_norm(optimizer):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    model.p = optimizer.param_groups[0]["params"][0]
    batch = torch.arange(12.0).reshape(4, 3)
    with optimizer.averaged_parameters(model=model, update_bn=[batch]):
        return [buffer.clone() for buffer in model.buffers()]


def copied_to_model(optimizer):
    model = torch.nn.ParameterList(
        [torch.zeros_like(p) for p in optimizer.param_groups[0]["params"]]
    )
    optimizer.copy_averages_to(model)
    return [p.detach() for p in model]


def settings(optimizer):
    optimizer.lazy_average = False
    optimizer.fused_amp = True
    step(optimizer)
    return optimizer.lazy_average, optimizer._step_supports_amp_scaling, optimizer.average_dtype


METHODS = [
    *(step, with_closure, change_lr, construct, deep_copy, pickled, save_and_load, averaged),
    *(copied_averages, averaged_model, start, reset, trigger, add_group, schedule, hooks, settings),
    *(asked, zero_grad, other_hooks, own_weights, batch_norm, copied_to_model),
]


def equal(one, other):
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            equal(x, y)
    elif isinstance(one, torch.Tensor):
        same(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_method_inside_a_compiled_function(method, steps):
    results = []
    for call in (method, torch.compile(method, backend="eager")):
        optimizer = ASGD(parameters((3,), (4, 2)), **OPTIONS)
        for _ in range(steps):
            step(optimizer)
        result = call(optimizer)
        step(optimizer)  # goes on as before
        entries = entries_of(optimizer)
        state = [[*entry.values()] for entry in entries.values()]
        results.append([result, [p.detach() for p in entries], state, str(optimizer)])
    equal(*results)


RECORDERS = {
    "make_fx": make_fx,
    "make_fx before dispatch": lambda function: make_fx(function, pre_dispatch=True),
    "torch.jit.trace": lambda function: lambda x: torch.jit.trace(function, (x,)),
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("call", ["asgd_", "step", "averaged_parameters", "copy_averages_to"])
def test_an_update_of_arrays_that_a_graph_would_lack_is_refused(call, recorder):
    param, grad = torch.ones(3), torch.ones(3)
    optimizer = ArrayASGD(param, lr=0.1, t0=-1)
    for _ in range(3):
        optimizer.step(grad)
    before, average = param.clone(), optimizer.averages[0].clone()

    def update(grad):
        if call == "asgd_":
            asgd_(param, grad, eta=0.1)
        elif call == "step":
            optimizer.step(grad)
        elif call == "averaged_parameters":
            with optimizer.averaged_parameters():
                pass
        else:
            optimizer.copy_averages_to(grad)
        return grad + 1

    name = recorder.partition(" ")[0]
    with pytest.raises(RuntimeError, match=f"{call}: {name} records torch's own operations alone"):
        RECORDERS[recorder](update)(grad)
    same(param, before)
    same(optimizer.averages[0], average)
    assert torch.equal(grad, torch.ones(3))
    optimizer.step(grad)


def test_a_step_is_refused_where_a_trace_cannot_have_it():
    """Of the torch optimizer, as of torch's."""
    for kind in (ASGD, torch.optim.ASGD):
        (p,) = parameters((3,))
        before, optimizer = p.detach().clone(), kind([p], **OPTIONS)

        def update(grad, p=p, optimizer=optimizer):
            p.grad = grad
            optimizer.step()
            return grad + 1

        with pytest.raises(RuntimeError, match="Tensor that requires grad as a constant"):
            torch.jit.trace(update, (torch.ones(3),))
        same(p.detach(), before)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_the_step_is_in_the_graph(pre_dispatch):
    """Of the torch optimizer, whose operations are then torch's."""
    (p,) = parameters((3,))
    optimizer = ASGD([p], **OPTIONS)

    def update(grad):
        p.grad = grad
        optimizer.step()
        return grad + 1

    assert "add_" in make_fx(update, pre_dispatch=pre_dispatch)(torch.ones(3)).code


def test_other_modes_that_look_at_operations_are_no_reason_to_refuse():
    from torch.utils.flop_counter import FlopCounterMode

    param = torch.ones(3)
    with FlopCounterMode(display=False):
        asgd_(param, torch.ones(3), eta=0.5, lambd=0.0)
    assert param.tolist() == [0.5] * 3


def test_numpy_arrays_in_a_compiled_function():
    param = np.ones(3)

    def update(x):
        asgd_(param, np.ones(3), eta=0.5, lambd=0.0)
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(update, backend="eager")(torch.ones(3))
    assert param.tolist() == [0.5] * 3
