"""Averages put to use: in the place of their params, copied elsewhere, in the model to ship."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from twins import Twins, bits, parameters, same

from asgd_fast._torch import averages as _averages
from asgd_fast import ASGD, ArrayASGD, _core, get_num_threads, set_num_threads

T0 = 2
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0, "weight_decay": 0.01}
BEGUN = T0 + 2  # after so many steps the averages have begun; two more make them differ
STEPS = BEGUN + 3

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 50),
    "transposed": lambda: torch.randn(5, 7).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "every other": lambda: torch.randn(20)[::2],
    "columns": lambda: torch.randn(6, 8)[:, 2:5],
}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def of_all_layouts(dtype):
    """A param of each layout; the gappy ones stay within larger memory."""
    params = []
    for make in LAYOUTS.values():
        tensor = make()
        whole = torch.zeros(
            tensor.untyped_storage().nbytes() // tensor.itemsize + 1,
            dtype=dtype,
        )
        view = whole.as_strided(tensor.shape, tensor.stride(), 1)
        params.append(nn.Parameter(view.copy_(tensor)))
    return params


def step(optimizer, params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def stepped(params, steps=STEPS, **options):
    optimizer = ASGD(params, **{**OPTIONS, **options})
    for k in range(steps):
        step(optimizer, params, k)
    return optimizer


def facts(optimizer):
    """The bits of all params and of their state, and where they are."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append((p.data_ptr(), p.stride(), p.dtype, bits(p.detach()).tolist()))
            for name, value in optimizer.state.get(p, {}).items():
                found.append((name, id(value), value.data_ptr(), value.dtype, value.stride()))
                found.append(bits(value.detach()).tolist())
    return found


def averages_of(optimizer, params):
    return [optimizer.state[p]["ax"].detach().clone() for p in params]


def same_values(ours, wanted):
    """The bits, whatever the layout."""
    assert ours.shape == wanted.shape
    assert ours.dtype == wanted.dtype
    assert torch.equal(bits(ours.detach()), bits(wanted.detach()))


class InsideError(Exception):
    """What happens inside."""


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("wide", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_params_are_averages_inside_and_get_their_bits_back(simd_level, dtype, wide, lazy):
    params = of_all_layouts(dtype)
    optimizer = ASGD(params, average_dtype=wide, lazy_average=lazy, **OPTIONS)
    for k in range(STEPS):
        step(optimizer, params, k)
        before = facts(optimizer)
        addresses = [p.data_ptr() for p in params]
        iterates = [p.detach().clone() for p in params]
        averages = averages_of(optimizer, params) if k + 1 >= BEGUN else iterates
        with optimizer.averaged_parameters():
            for p, ax in zip(params, averages, strict=True):
                same_values(p, ax.to(dtype))
            assert [p.data_ptr() for p in params] == addresses
        assert facts(optimizer) == before
        with pytest.raises(InsideError), optimizer.averaged_parameters():
            raise InsideError
        assert facts(optimizer) == before
    assert any(not torch.equal(p, ax.to(dtype)) for p, ax in zip(iterates, averages, strict=True))


def test_steps_afterwards_have_the_bits_of_torch():
    twins = Twins([*parameters((3,), (40, 5), ()), nn.Parameter(torch.randn(20)[::2])], **OPTIONS)
    for _ in range(STEPS + 2):
        twins.step()
        with twins.ours.averaged_parameters():
            pass
        for ours, theirs in zip(twins.params, twins.theirs_params, strict=True):
            assert torch.equal(ours, theirs)
            for name in ("step", "eta", "mu", "ax"):
                assert torch.equal(twins.ours.state[ours][name], twins.theirs.state[theirs][name])


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_what_is_written_inside_does_not_reach_the_iterates(wide):
    params = [*parameters((3,), (40, 5)), nn.Parameter(torch.randn(20)[::2])]
    optimizer = stepped(params, average_dtype=wide)
    iterates, averages = [p.detach().clone() for p in params], averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        for p in params:
            p.detach().fill_(7)
    for p, iterate, ax in zip(params, iterates, averages, strict=True):
        same_values(p, iterate)
        if wide is not None:  # else the average itself stood there
            same_values(optimizer.state[p]["ax"], ax)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_averages_are_rounded_as_torch_rounds_them(simd_level, dtype, wide):
    """Of any bit pattern: subnormal and huge numbers, ties, infinities and nans."""
    patterns = np.random.default_rng(0).integers(-(2**62), 2**62, 20_000) * 2
    ax = torch.tensor(patterns).view(torch.float64).to(wide)
    near = torch.randn(5_000, dtype=torch.float64).to(dtype).to(wide)  # and half an ulp away
    ties = near * (1 + torch.finfo(dtype).eps / 2)
    ax = torch.cat([ax, near, ties, ties.nextafter(near), torch.tensor([1e-8, -0.0, 65519.0])])
    for n in (*range(1, 35), len(ax)):
        p = nn.Parameter(torch.zeros(n).to(dtype))
        optimizer = stepped([p], average_dtype=wide)
        optimizer.state[p]["ax"].copy_(ax[-n:])
        wanted = ax[-n:].to(dtype)
        number = ~torch.isnan(wanted)
        with optimizer.averaged_parameters():
            assert torch.equal(torch.isnan(p), ~number)
            same(p[number], wanted[number])
        shipped = torch.zeros(n).to(dtype)
        optimizer.copy_averages_to([shipped])
        same(shipped[number], wanted[number])


@pytest.mark.heavy
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_large_params_with_two_threads(dtype, wide):
    before = get_num_threads()
    set_num_threads(2)
    try:
        n = (5 << 20) // dtype.itemsize + 13
        params = [nn.Parameter(torch.randn(size).to(dtype)) for size in (n, 3, 100_000)]
        optimizer = stepped(params, BEGUN + 2, average_dtype=wide)
        iterates = [p.detach().clone() for p in params]
        averages = averages_of(optimizer, params)
        with optimizer.averaged_parameters():
            for p, ax in zip(params, averages, strict=True):
                same(p, ax.to(dtype))
        for p, iterate, ax in zip(params, iterates, averages, strict=True):
            same(p, iterate)
            same(optimizer.state[p]["ax"], ax)
    finally:
        set_num_threads(before)


def test_nothing_happens_before_averaging_has_begun():
    """Nor without a step, nor to params that had no gradient yet."""
    params = parameters((3,), (4,))
    optimizer = ASGD(params, **OPTIONS)
    for k in range(BEGUN):
        before, versions = facts(optimizer), [p._version for p in params]
        with optimizer.averaged_parameters():
            assert facts(optimizer) == before
        assert [p._version for p in params] == versions
        step(optimizer, params[:1], k)
        params[0].grad = None
    iterate, ax = params[0].detach().clone(), *averages_of(optimizer, params[:1])
    same(iterate, ax)  # the average of one
    assert params[1] not in optimizer.state
    for k in range(2):
        step(optimizer, params[:1], k)
    iterate, other = (p.detach().clone() for p in params)
    with optimizer.averaged_parameters():
        same(params[0], optimizer.state_dict()["state"][0]["ax"])
        assert not torch.equal(params[0], iterate)
        same(params[1], other)
    assert params[1] not in optimizer.state


def test_groups_whose_averages_begin_each_at_its_time():
    params = parameters((3,), (4,))
    groups = [{"params": params[:1], "t0": 0}, {"params": params[1:], "t0": 100}]
    optimizer = ASGD(groups, lr=0.3)
    for k in range(4):
        step(optimizer, params, k)
    (ax, _), other = averages_of(optimizer, params), params[1].detach().clone()
    with optimizer.averaged_parameters():
        same(params[0], ax)
        same(params[1], other)


@pytest.mark.parametrize("average_every", [1, 3])
def test_averages_of_some_iterates_only(average_every):
    params = parameters((3,))
    optimizer = ASGD(params, average_every=average_every, **OPTIONS)
    for k in range(BEGUN + 7):
        step(optimizer, params, k)
        ax = averages_of(optimizer, params)[0] if k + 1 >= BEGUN else params[0].detach().clone()
        with optimizer.averaged_parameters():
            same(params[0], ax)


def test_params_that_share_memory():
    for parts in ((slice(0, 8), slice(4, 12)), (slice(0, 12), slice(0, 12, 2))):
        memory = torch.randn(12)
        params = [nn.Parameter(memory[part]) for part in parts]
        optimizer = stepped(params)
        before, averages = facts(optimizer), averages_of(optimizer, params)
        with optimizer.averaged_parameters():
            assert torch.equal(params[1], averages[1])
        assert facts(optimizer) == before


def test_params_that_are_listed_twice_or_share_their_state():
    (p,) = parameters((5,))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = stepped([p, p])
    params = parameters((5,), (5,))
    shared = stepped(params)
    shared.state[params[1]] = shared.state[params[0]]
    for optimizer, own in ((twice, [p]), (shared, params)):
        before = facts(optimizer)
        (ax, *_) = averages_of(optimizer, own)
        with optimizer.averaged_parameters():
            for q in own:
                same(q, ax)
        assert facts(optimizer) == before


def closure():
    raise AssertionError("the closure was called")


REFUSED = {
    "step": lambda optimizer: optimizer.step(),
    "step ": lambda optimizer: optimizer.step(closure),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "averaged_parameters": lambda optimizer: optimizer.averaged_parameters().__enter__(),
    "start_averaging": lambda optimizer: optimizer.start_averaging(),
    "start_averaging ": lambda optimizer: optimizer.reset_averages(),
    "copying the optimizer": copy.deepcopy,
    "copying the optimizer ": pickle.dumps,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_calls_refused_inside_lose_nothing(name, wide):
    params = parameters((3,), (4, 5))
    optimizer = stepped(params, average_dtype=wide)
    before, averages = facts(optimizer), averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        with pytest.raises(RuntimeError, match=f"^{name.strip()}: not inside averaged_parameters"):
            REFUSED[name](optimizer)
        for p, ax in zip(params, averages, strict=True):
            same(p, ax.float())
    assert facts(optimizer) == before
    step(optimizer, params)


def test_a_nested_context_leaves_the_outer_one_alone():
    params = parameters((3,))
    optimizer = stepped(params)
    before = facts(optimizer)
    with optimizer.averaged_parameters():
        inside = params[0].detach().clone()
        with pytest.raises(RuntimeError, match=r"^averaged_parameters: "):
            optimizer.averaged_parameters().__enter__()
        same(params[0], inside)
        with pytest.raises(RuntimeError, match=r"^step: "):
            optimizer.step()
    assert facts(optimizer) == before


def test_two_optimizers_of_one_model():
    """Each holds its own part, in any order of leaving."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizers = [stepped(list(part.parameters())) for part in model]
    before = [facts(optimizer) for optimizer in optimizers]
    contexts = [optimizer.averaged_parameters() for optimizer in optimizers]
    for context in contexts:
        context.__enter__()
    assert [facts(optimizer) for optimizer in optimizers] != before
    for context in contexts:
        context.__exit__(None, None, None)
    assert [facts(optimizer) for optimizer in optimizers] == before


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_a_checkpoint_taken_inside_is_that_of_outside(wide):
    params = [*parameters((3,), (4, 5)), nn.Parameter(torch.randn(20)[::2])]
    optimizer = stepped(params, average_dtype=wide)
    outside = copy.deepcopy(optimizer.state_dict())
    with optimizer.averaged_parameters():
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        held = optimizer.state_dict()
        kept = copy.deepcopy(held)
    file.seek(0)
    for inside in (torch.load(file), kept):
        assert inside["param_groups"] == outside["param_groups"]
        for i, entry in outside["state"].items():
            assert list(inside["state"][i]) == list(entry)
            for name, value in entry.items():
                same_values(inside["state"][i][name], value)


def test_a_checkpoint_taken_inside_holds_averages_that_stay():
    """It is looked at after the context, as by those who save it in a thread."""
    params = parameters((3,), (4, 5))
    optimizer = stepped(params)
    wanted = averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        held = optimizer.state_dict()
    for i, ax in enumerate(wanted):
        same(held["state"][i]["ax"], ax)


def model_with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def trained(model, **options):
    optimizer = ASGD(model.parameters(), **{**OPTIONS, **options})
    for k in range(STEPS):
        torch.manual_seed(k)
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    return optimizer


def test_the_models_own_state_dict_holds_the_averages_inside():
    model = model_with_batch_norm()
    optimizer = trained(model)
    averages = dict(
        zip(
            [name for name, _ in model.named_parameters()],
            averages_of(optimizer, list(model.parameters())),
            strict=True,
        )
    )
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged_parameters():
        inside = copy.deepcopy(model.state_dict())
        for name, value in inside.items():
            wanted = averages.get(name, before[name])  # buffers are as they were
            assert torch.equal(value, wanted)
        copied = copy.deepcopy(model)
    for name, value in copied.state_dict().items():
        assert torch.equal(value, inside[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(inside["0.weight"], before["0.weight"])


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_data_replaced_inside(make, wide):
    """The iterate goes into the new memory, and the average is not touched."""
    twins = Twins([nn.Parameter(make())], **OPTIONS)
    (p,), (q,) = twins.params, twins.theirs_params
    twins.ours.average_dtype = wide
    for _ in range(STEPS):
        twins.step()
    (ax,) = averages_of(twins.ours, [p])
    iterate = p.detach().clone()
    with twins.ours.averaged_parameters():
        p.data = replaced = torch.full_like(p, 7.0)
        assert twins.ours.state_dict()["state"][0]["ax"].equal(ax)
    assert p.data_ptr() == replaced.data_ptr()
    assert torch.equal(p, iterate)
    assert torch.equal(twins.ours.state[p]["ax"], ax)
    for _ in range(3):
        twins.step()
        assert torch.equal(p, q)
    if wide is None:
        assert torch.equal(twins.ours.state[p]["ax"], twins.theirs.state[q]["ax"])


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_a_checkpoint_taken_after_data_was_replaced_inside(wide):
    (p,) = parameters((3, 4))
    optimizer = stepped([p], average_dtype=wide)
    (ax,) = averages_of(optimizer, [p])
    with optimizer.averaged_parameters():
        p.data = torch.full_like(p, 7.0)
        held = optimizer.state_dict()["state"][0]["ax"]
        assert torch.equal(held, ax)
    assert torch.equal(held, ax)


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("target", [torch.float16, torch.float64], ids=str)
def test_a_model_converted_inside(target, wide):
    """To the iterate in the new dtype; the averages stay as they were."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = trained(model, average_dtype=wide)
    params = list(model.parameters())
    iterates, averages = [p.detach().clone() for p in params], averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        model.to(target)
        for p, ax in zip(params, averages, strict=True):
            same(p, ax.float().to(target))
    for p, iterate, ax in zip(params, iterates, averages, strict=True):
        same(p, iterate.to(target))
        same(optimizer.state[p]["ax"], ax)


def test_buffers_are_not_touched():
    model = model_with_batch_norm()
    optimizer = trained(model)
    before = [(b.data_ptr(), b._version, b.tolist()) for b in model.buffers()]
    with optimizer.averaged_parameters():
        assert [(b.data_ptr(), b._version, b.tolist()) for b in model.buffers()] == before
    assert [(b.data_ptr(), b._version, b.tolist()) for b in model.buffers()] == before


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", [LAYOUTS["contiguous"], LAYOUTS["columns"]])
def test_autograd_notices_what_changed(make, wide):
    p = nn.Parameter(make())
    optimizer = stepped([p], average_dtype=wide)
    message = "modified by an inplace operation"
    saved = p.square().sum()  # keeps p for its backward
    with optimizer.averaged_parameters():
        with pytest.raises(RuntimeError, match=message):
            saved.backward()
        p.square().sum().backward()
        within = p.square().sum()
    with pytest.raises(RuntimeError, match=message):
        within.backward()
    p.grad = None
    p.square().sum().backward()
    assert torch.equal(p.grad, 2 * p.detach())


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("order", ["outside", "inside", "across"])
def test_under_the_modes_in_which_models_are_evaluated(mode, order, wide):
    model = model_with_batch_norm().eval()
    optimizer = trained(model, average_dtype=wide)
    before = facts(optimizer)
    x = torch.randn(5, 3)
    shipped = copy.deepcopy(model)
    optimizer.copy_averages_to(shipped.parameters())
    wanted = shipped(x).detach()
    if order == "outside":
        with mode(), optimizer.averaged_parameters():
            got = model(x)
    elif order == "inside":
        with optimizer.averaged_parameters(), mode():
            got = model(x)
    else:
        context, other = mode(), optimizer.averaged_parameters()
        context.__enter__()
        other.__enter__()
        got = model(x)
        context.__exit__(None, None, None)
        other.__exit__(None, None, None)
    assert torch.equal(got, wanted)
    assert facts(optimizer) == before
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    model(x).sum().backward()
    optimizer.step()


def test_an_average_of_another_shape_is_refused():
    params = parameters((3,), (4,))
    optimizer = stepped(params)
    ax, optimizer.state[params[1]]["ax"] = optimizer.state[params[1]]["ax"], torch.zeros(5)
    values = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"'ax' of shape \(5,\) does not match .* \(4,\)$"):
        optimizer.averaged_parameters().__enter__()
    optimizer.state[params[1]]["ax"] = ax
    for p, value in zip(params, values, strict=True):
        same(p, value)
    (_, wanted) = averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        same(params[1], wanted)


def test_averages_replaced_by_hand():
    """By ones in another dtype or layout, or on what is no plain tensor."""
    p = nn.Parameter(torch.randn(4, 5))
    optimizer = stepped([p])
    for ax in (torch.randn(4, 5).double(), torch.randn(5, 4).t(), torch.randn(4, 10)[:, ::2]):
        optimizer.state[p]["ax"] = ax
        before = facts(optimizer)
        with optimizer.averaged_parameters():
            assert torch.equal(p, ax.float())
        assert facts(optimizer) == before


@pytest.fixture
def interruptible():
    """Even where signals are ignored, as in the background of a script."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupting(function, at, before):
    """A function whose call number `at` is interrupted, before or after it has done its work."""
    calls = iter(range(100))

    def wrapper(*arguments):
        now = next(calls) == at
        if now and before:
            signal.raise_signal(signal.SIGINT)
        result = function(*arguments)
        if now:
            signal.raise_signal(signal.SIGINT)
        return result

    return wrapper


PLACES = {
    "before the pass in": (_core, "exchange", 0, True),
    "after the pass in": (_core, "exchange", 0, False),
    "before the state is told": (_averages, "_put_averages", 0, True),
    "after the state is told": (_averages, "_put_averages", 0, False),
    "before autograd is told": (_averages, "increment_versions", 0, True),
    "before the pass out": (_core, "exchange", 1, True),
    "after the pass out": (_core, "exchange", 1, False),
    "before autograd is told on the way out": (_averages, "increment_versions", 1, True),
    "after autograd is told on the way out": (_averages, "increment_versions", 1, False),
    "before the state is told on the way out": (_averages, "_put_back", 0, True),
    "after the state is told on the way out": (_averages, "_put_back", 0, False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", [LAYOUTS["contiguous"], LAYOUTS["columns"]], ids=["", "gappy"])
def test_an_interrupt_loses_nothing(interruptible, monkeypatch, make, wide, place):
    params = [nn.Parameter(make()), *parameters((40,))]
    optimizer = stepped(params, average_dtype=wide)
    before = facts(optimizer)
    module, name, at, is_before = PLACES[place]

    def evaluate():
        with optimizer.averaged_parameters():
            pass

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupting(getattr(module, name), at, is_before))
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    assert facts(optimizer) == before
    with optimizer.averaged_parameters():  # it is outside again
        assert not torch.equal(params[0], torch.zeros_like(params[0]))
    step(optimizer, params)


def test_an_interrupt_inside(interruptible):
    params = parameters((3,), (4, 5))
    optimizer = stepped(params)
    before = facts(optimizer)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged_parameters():
        signal.raise_signal(signal.SIGINT)
    assert facts(optimizer) == before


def test_a_context_that_is_dropped_puts_everything_back():
    params = parameters((3,))
    optimizer = stepped(params)
    before = facts(optimizer)
    context = optimizer.averaged_parameters()
    context.__enter__()
    assert facts(optimizer) != before
    del context
    gc.collect()
    assert facts(optimizer) == before


# Copies


def test_copied_into_the_model_itself():
    model = model_with_batch_norm()
    optimizer = trained(model)
    averages = averages_of(optimizer, list(model.parameters()))
    buffers = [b.clone() for b in model.buffers()]
    optimizer.copy_averages_to(model)
    for p, ax in zip(model.parameters(), averages, strict=True):
        same(p, ax)
        same(optimizer.state[p]["ax"], ax)
        assert optimizer.state[p]["ax"].data_ptr() != p.data_ptr()
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.float16], ids=str)
def test_copied_into_another_model(target, wide):
    """By the order of the params; only those that the optimizer has, where it is their own."""
    model = model_with_batch_norm()
    optimizer = trained(model, average_dtype=wide)
    other = copy.deepcopy(model).to(target)
    before = facts(optimizer)
    optimizer.copy_averages_to(other)
    assert facts(optimizer) == before
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        same(q, optimizer.state[p]["ax"].to(target))
        assert q.requires_grad
    part = ASGD(model[3].parameters())
    frozen = model[0].weight.detach().clone()
    part.copy_averages_to(model)
    same(model[0].weight, frozen)


class Turned(nn.Module):
    """The modules of another, made in another order."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(3, 3)
        self.first = nn.Linear(3, 3)


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)


def test_copied_by_names():
    model, other = Straight(), Turned()
    groups = [
        {"params": list(model.second.named_parameters(prefix="second"))},
        {"params": list(model.first.named_parameters(prefix="first")), "lr": 0.1},
    ]
    optimizer = ASGD(groups, **OPTIONS)
    for k in range(STEPS):
        step(optimizer, list(model.parameters()), k)
    optimizer.copy_averages_to(other)
    for name, p in model.named_parameters():
        same(other.get_parameter(name), optimizer.state[p]["ax"])
    extended = nn.ModuleDict({"first": nn.Linear(3, 3), "third": nn.Linear(3, 3)})
    before = [p.detach().clone() for p in extended.parameters()]
    with pytest.raises(ValueError, match=r"no parameters named \['second.weight', 'second.bias'\]"):
        optimizer.copy_averages_to(extended)
    for p, value in zip(extended.parameters(), before, strict=True):
        same(p, value)


def test_copied_into_tensors():
    params = [*parameters((3,), (4, 5)), nn.Parameter(torch.randn(20)[::2])]
    fresh = parameters((6,))
    optimizer = stepped(params)
    optimizer.add_param_group({"params": fresh})
    targets = [
        torch.zeros(3),
        torch.zeros(5, 4).t(),
        torch.zeros(10, dtype=torch.float64),
        nn.Parameter(torch.zeros(6).bfloat16()),
    ]
    optimizer.copy_averages_to(iter(targets))
    averages = averages_of(optimizer, params)
    assert torch.equal(targets[0], averages[0])
    assert torch.equal(targets[1], averages[1])
    assert torch.equal(targets[2], averages[2].double())
    assert torch.equal(targets[3], fresh[0].bfloat16())  # its averaging has not begun


def test_copied_inside_the_context():
    params = parameters((3,), (4, 5))
    for wide in (None, torch.float64):
        optimizer = stepped(params, average_dtype=wide)
        outside, inside = ([torch.zeros_like(p).double() for p in params] for _ in range(2))
        optimizer.copy_averages_to(outside)
        with optimizer.averaged_parameters():
            optimizer.copy_averages_to(inside)
        for one, other in zip(outside, inside, strict=True):
            same(one, other)


def test_copies_that_do_not_fit_change_nothing():
    params = parameters((3,), (4, 5))
    optimizer = stepped(params)
    good, short = torch.zeros(3), [torch.zeros(3)]
    refused = [
        (short, ValueError, "^target: got 1 tensors for 2 params; expected one for each$"),
        ([good, torch.zeros(5, 4)], ValueError, r"^target: tensor 1 of shape \(5, 4\) does not"),
        ([good, [1.0]], TypeError, "^target: expected a torch.nn.Module or an iterable of tensors"),
        (torch.zeros(2, 3), TypeError, "^target: expected a torch.nn.Module or .*, got Tensor$"),
        (3.0, TypeError, "^target: expected .*, got float$"),
        (nn.Linear(3, 2), ValueError, r"^target: tensor 0 of shape \(2, 3\) does not match"),
        (nn.Linear(3, 2, bias=False), ValueError, "^target: got 1 tensors for 2 params"),
    ]
    for target, error, message in refused:
        before = copy.deepcopy(target)
        with pytest.raises(error, match=message):
            optimizer.copy_averages_to(target)
        if isinstance(target, nn.Module):
            assert torch.equal(target.weight, before.weight)
    assert not good.any()
    assert not short[0].any()


def test_a_model_whose_groups_are_not_clear_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters()}]
    optimizer = ASGD(groups)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"not clear which of its parameters .* 2 groups"):
        optimizer.copy_averages_to(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        same(p, q)
    optimizer.copy_averages_to(model)  # its own params are always clear


# The model to ship


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_the_state_dict_of_the_model_to_ship(wide):
    model = model_with_batch_norm()
    optimizer = trained(model, average_dtype=wide)
    before, own = facts(optimizer), copy.deepcopy(model.state_dict())
    shipped = optimizer.averaged_state_dict(model)
    assert facts(optimizer) == before
    assert list(shipped) == list(own)
    assert shipped._metadata == own._metadata
    by_name = dict(model.named_parameters())
    addresses = {p.data_ptr() for p in model.state_dict().values()}
    for name, value in shipped.items():
        wanted = optimizer.state[by_name[name]]["ax"].float() if name in by_name else own[name]
        assert torch.equal(value, wanted)
        assert not value.requires_grad
        assert value.data_ptr() not in addresses
    with optimizer.averaged_parameters():
        inside = optimizer.averaged_state_dict(model)
    assert all(torch.equal(inside[name], value) for name, value in shipped.items())
    fresh = model_with_batch_norm().eval()
    fresh.load_state_dict(shipped)
    x = torch.randn(5, 3)
    with optimizer.averaged_parameters():
        assert torch.equal(model.eval()(x), fresh(x))


def test_params_without_gradient_are_shipped_as_they_are():
    """And those that the optimizer does not have."""
    model = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(3)])
    optimizer = ASGD([model[0].weight, model[1].weight], **OPTIONS)
    for k in range(STEPS):
        step(optimizer, [model[0].weight], k)
    shipped = optimizer.averaged_state_dict(model)
    same(shipped["0.weight"], optimizer.state[model[0].weight]["ax"])
    same(shipped["1.weight"], model[1].weight)
    same(shipped["2.weight"], model[2].weight)


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"in": nn.Embedding(7, 3), "out": nn.Linear(3, 7, bias=False)})
    model["out"].weight = model["in"].weight
    optimizer = stepped(list(model.parameters()))
    shipped = optimizer.averaged_state_dict(model)
    assert shipped["in.weight"].data_ptr() == shipped["out.weight"].data_ptr()
    same(shipped["in.weight"], optimizer.state[model["in"].weight]["ax"])


def test_a_part_of_the_model_and_a_foreign_one():
    model = model_with_batch_norm()
    optimizer = trained(model)
    part = optimizer.averaged_state_dict(model[0])
    assert list(part) == ["weight", "bias"]
    same(part["bias"], optimizer.state[model[0].bias]["ax"])
    with pytest.raises(ValueError, match=r"^model: has none of the optimizer's params$"):
        optimizer.averaged_state_dict(copy.deepcopy(model))


def test_batch_norm_of_the_model_to_ship():
    """By torch's own recipe, on a copy: statistics of the inputs under averaged weights."""
    model = model_with_batch_norm()
    optimizer = trained(model)
    before = [b.clone() for b in model.buffers()]
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(optimizer.averaged_state_dict(model))
    batches = [torch.randn(16, 3) for _ in range(4)]
    update_bn(batches, shipped)
    weight, bias = (optimizer.state[p]["ax"] for p in model[0].parameters())
    hidden = [x @ weight.t() + bias for x in batches]
    mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    var = torch.stack([h.var(0) for h in hidden]).mean(0)
    torch.testing.assert_close(shipped[1].running_mean, mean)
    torch.testing.assert_close(shipped[1].running_var, var)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before, strict=True))


# Arrays


def arrays_of_all_kinds():
    rng = np.random.default_rng(0)
    kinds = [
        rng.standard_normal((3, 4)),
        np.asfortranarray(rng.standard_normal((5, 6)).astype(np.float32)),
        rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(1, 2, 0),
        rng.standard_normal(()).astype(np.float64),
        np.zeros((3, 0), np.float32),
        rng.standard_normal(33).astype(np.float16),
        (rng.standard_normal(5) + 1j * rng.standard_normal(5)).astype(np.complex64),
    ]
    return [*kinds, torch.randn(5, 7).t(), torch.randn(40).to(torch.bfloat16)]


def grads_like(arrays, k):
    rng = np.random.default_rng(k)
    grads = []
    for x in arrays:
        grad = x.clone() if isinstance(x, torch.Tensor) else x.copy(order="K")
        grad[...] = (
            rng.standard_normal(x.shape)
            if not isinstance(x, torch.Tensor)
            else (torch.tensor(rng.standard_normal(tuple(x.shape))))
        )
        grads.append(grad)
    return grads


def raw(array):
    """The bytes of an array in the order of its indices, with its dtype."""
    if isinstance(array, torch.Tensor):
        return str(array.dtype), bits(array).numpy().tobytes()
    return str(array.dtype), array.tobytes()


def rounded_to(ax, like):
    return ax.to(like.dtype) if isinstance(ax, torch.Tensor) else ax.astype(like.dtype)


def run(optimizer, arrays, steps=STEPS, start=0):
    for k in range(start, start + steps):
        optimizer.step(grads_like(arrays, k))


@pytest.mark.parametrize("wide", [None, "float32", "float64"])
def test_arrays_are_averages_inside_and_get_their_bits_back(wide):
    arrays = arrays_of_all_kinds()
    optimizer = ArrayASGD(arrays, average_dtype=wide, **OPTIONS)
    for k in range(STEPS):
        run(optimizer, arrays, 1, k)
        held = list(optimizer.averages)
        before = [raw(x) for x in arrays], [raw(ax) for ax in held]
        inside = [
            raw(rounded_to(ax, x)) if k + 1 >= BEGUN else raw(x)
            for ax, x in zip(held, arrays, strict=True)
        ]
        with optimizer.averaged_parameters():
            assert [raw(x) for x in arrays] == inside
            assert [raw(ax) for ax in optimizer.averages] == before[1]
        assert [raw(x) for x in arrays] == before[0]
        with pytest.raises(InsideError), optimizer.averaged_parameters():
            raise InsideError
        assert [raw(x) for x in arrays] == before[0]
        assert [raw(ax) for ax in optimizer.averages] == before[1]
        assert all(ax is x for ax, x in zip(optimizer.averages, held, strict=True))
    assert inside != before[0]


@pytest.mark.parametrize("wide", [None, "float64"])
def test_saved_states_of_arrays_inside_and_outside(wide, through):
    arrays = arrays_of_all_kinds()[:-1]  # NumPy has no bfloat16
    optimizer = ArrayASGD(arrays, average_dtype=wide, **OPTIONS)
    run(optimizer, arrays)
    outside = optimizer.state_dict()
    with optimizer.averaged_parameters():
        held = optimizer.state_dict()
        inside = through(held)
    for state in (held, inside):
        assert set(state) == set(outside)
        for name, value in outside.items():
            assert raw(np.asarray(state[name])) == raw(value)


ARRAY_REFUSED = {
    "step": lambda optimizer: optimizer.step(grads_like(optimizer.param_groups[0]["params"], 0)),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "averaged_parameters": lambda optimizer: optimizer.averaged_parameters().__enter__(),
    "start_averaging": lambda optimizer: optimizer.start_averaging(),
    "start_averaging ": lambda optimizer: optimizer.reset_averages(),
    "copying the optimizer": copy.deepcopy,
    "copying the optimizer ": pickle.dumps,
}


@pytest.mark.parametrize("name", ARRAY_REFUSED)
@pytest.mark.parametrize("wide", [None, "float64"])
def test_calls_on_arrays_refused_inside_lose_nothing(name, wide):
    arrays = arrays_of_all_kinds()[:-1]
    optimizer = ArrayASGD(arrays, average_dtype=wide, **OPTIONS)
    run(optimizer, arrays)
    before = [raw(x) for x in (*arrays, *optimizer.averages)]
    message = f"^{name.strip()}: not inside averaged_parameters"
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match=message):
        ARRAY_REFUSED[name](optimizer)
    assert [raw(x) for x in (*arrays, *optimizer.averages)] == before
    run(optimizer, arrays, 1)


ARRAY_PLACES = {
    "before the pass in": (0, True),
    "after the pass in": (0, False),
    "before the pass out": (1, True),
    "after the pass out": (1, False),
}


@pytest.mark.parametrize("place", ARRAY_PLACES)
@pytest.mark.parametrize("wide", [None, "float64"])
def test_an_interrupt_loses_no_arrays(interruptible, monkeypatch, wide, place):
    arrays = [np.arange(5.0), np.arange(7.0, dtype=np.float32)]
    optimizer = ArrayASGD(arrays, average_dtype=wide, **OPTIONS)
    run(optimizer, arrays)
    before = [raw(x) for x in (*arrays, *optimizer.averages)]

    def evaluate():
        with optimizer.averaged_parameters():
            pass

    with monkeypatch.context() as patch:
        patch.setattr(_core, "exchange", interrupting(_core.exchange, *ARRAY_PLACES[place]))
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    assert [raw(x) for x in (*arrays, *optimizer.averages)] == before
    run(optimizer, arrays, 1)


@pytest.mark.parametrize("wide", [None, "float64"])
def test_averages_copied_to_arrays(wide):
    arrays = arrays_of_all_kinds()
    fresh = np.ones(3)
    optimizer = ArrayASGD([*arrays, fresh], average_dtype=wide, **OPTIONS)
    for k in range(STEPS):
        optimizer.step([*grads_like(arrays, k), None])
    wanted = [raw(rounded_to(ax, x)) for ax, x in zip(optimizer.averages, arrays, strict=False)]
    before = [raw(x) for x in (*arrays, *optimizer.averages)]
    targets = [*grads_like(arrays, 0), np.zeros(3)]
    optimizer.copy_averages_to(targets)
    assert [raw(x) for x in targets] == [*wanted, raw(fresh)]
    again = [*grads_like(arrays, 0), np.zeros(3)]
    with optimizer.averaged_parameters():
        optimizer.copy_averages_to(again)
    assert [raw(x) for x in again] == [*wanted, raw(fresh)]
    assert [raw(x) for x in (*arrays, *optimizer.averages)] == before
    optimizer.copy_averages_to([*arrays, fresh])
    assert [raw(x) for x in arrays] == wanted
    assert (fresh == 1).all()
    assert [raw(x) for x in optimizer.averages] == before[len(arrays) :]


def test_copies_to_arrays_that_do_not_fit_change_nothing():
    arrays = [np.ones(3), np.ones(4, np.float32)]
    optimizer = ArrayASGD(arrays, **OPTIONS)
    run(optimizer, arrays)
    good = np.zeros(3)
    read_only = np.zeros(4, np.float32)
    read_only.flags.writeable = False
    shared = np.zeros(8)
    for targets, error, message in (
        ([good], ValueError, "^arrays: got 1 arrays for 2 params"),
        ([good, np.zeros(5, np.float32)], ValueError, r"shape \(4,\) does not match .*\(5,\)"),
        ([good, np.zeros(4, np.float64)], ValueError, "dtype float32 does not match"),
        ([good, read_only], BufferError, r"^arrays\[1\]"),
        ([good, None], TypeError, r"^arrays\[1\]"),
        ([shared[:3], shared.view(np.float32)[4:8]], ValueError, "shares memory"),
    ):
        with pytest.raises(error, match=message):
            optimizer.copy_averages_to(targets)
        assert not good.any()
        assert not shared.any()


def test_models_of_torch_and_arrays_have_the_same_averages_inside(double_scalars):
    arrays = [np.arange(5.0), np.arange(12.0, dtype=np.float32).reshape(3, 4)]
    tensors = [nn.Parameter(torch.tensor(x)) for x in arrays]
    ours, theirs = ArrayASGD(arrays, **OPTIONS), ASGD(tensors, **OPTIONS)
    for k in range(STEPS):
        grads = grads_like(arrays, k)
        ours.step(grads)
        for p, grad in zip(tensors, grads, strict=True):
            p.grad = torch.tensor(grad)
        theirs.step()
    with ours.averaged_parameters(), theirs.averaged_parameters():
        for x, p in zip(arrays, tensors, strict=True):
            assert np.array_equal(x, p.detach().numpy())
