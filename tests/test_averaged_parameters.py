"""averaged_parameters() of torch params: averages inside, and every bit back outside."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from averaging import (
    BEGUN,
    DTYPES,
    LAYOUTS,
    OPTIONS,
    STEPS,
    InsideError,
    asks_early,
    averages_of,
    facts,
    of_all_layouts,
    same_values,
    saves_inside,
    step,
    stepped,
)
from torch import nn
from twins import Twins, parameters, same

from asgd_fast import ASGD

pytestmark = pytest.mark.usefixtures("seeded")


@asks_early
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


@asks_early
@pytest.mark.parametrize("look", [False, True], ids=["sealed", "open"])
def test_steps_afterwards_have_the_bits_of_torch(look):
    twins = Twins([*parameters((3,), (40, 5), ()), nn.Parameter(torch.randn(20)[::2])], **OPTIONS)
    for _ in range(STEPS + 2):
        twins.step()
        with twins.ours.averaged_parameters():
            if look:
                twins.look()
        twins.check()


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_an_average_inside_is_a_copy_of_its_param(make, lazy):
    """Since it stands there; a wider one stays in the state."""
    p = nn.Parameter(make())
    optimizer = stepped([p], lazy_average=lazy)
    before = facts(optimizer)
    for _ in range(2):
        with optimizer.averaged_parameters():
            inside, answer = p.detach().clone(), optimizer.state[p]["ax"]
            same_values(answer, inside)
            if p.is_contiguous() and p.numel():
                assert "ax" not in optimizer.state[p]
            if "ax" not in optimizer.state[p]:
                answer.fill_(7)
                same_values(p, inside)
                same_values(optimizer.state[p]["ax"], inside)
        assert facts(optimizer) == before
    wide = stepped([nn.Parameter(make())], average_dtype=torch.float64)
    (own,) = wide.state.values()
    ax, kept = own["ax"], own["ax"].clone()
    with wide.averaged_parameters():
        assert own["ax"] is ax
        same_values(ax, kept)


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


@pytest.mark.heavy
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
def test_large_params_with_two_threads(two_threads, dtype, wide):
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


@asks_early
@saves_inside
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


def evaluate(optimizer):
    with optimizer.averaged_parameters():
        pass


@pytest.mark.parametrize(
    "call",
    [
        evaluate,
        lambda optimizer: optimizer.copy_averages_to([torch.zeros(3), torch.zeros(4, 5)]),
        lambda optimizer: optimizer.start_averaging(),
    ],
    ids=["averaged_parameters", "copy_averages_to", "start_averaging"],
)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_it_is_no_look_into_the_state(wide, call):
    """After one, each step has tensors to read and write, and checkpoints hold these tensors."""
    params = parameters((3,), (4, 5))
    optimizer = stepped(params, average_dtype=wide)
    call(optimizer)
    saved = optimizer.state_dict()["state"][0]["step"]
    step(optimizer, params)
    assert saved == STEPS


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


@asks_early
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


def test_an_average_set_by_hand_before_averaging_begins():
    """With its weight: checkpoints have it, and the params hold it inside."""
    (p,) = parameters((3,))
    optimizer = stepped([p], 1)
    optimizer.state[p]["ax"] = ax = torch.randn(3)
    kept = ax.clone()
    optimizer.state[p]["mu"].fill_(0.5)
    for _ in range(2):
        same(optimizer.state_dict()["state"][0]["ax"], ax)
        with optimizer.averaged_parameters():
            same(p, kept)


@saves_inside
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_calls_refused_inside_lose_nothing(name, wide):
    params = parameters((3,), (4, 5))
    optimizer = stepped(params, average_dtype=wide)
    before, averages = facts(optimizer), averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        message = f"^{name.strip()}: is not possible inside averaged_parameters"
        with pytest.raises(RuntimeError, match=message):
            REFUSED[name](optimizer)
        for p, ax in zip(params, averages, strict=True):
            same(p, ax.float())
        with pytest.raises(RuntimeError, match=r"^step: "):  # it is inside still
            optimizer.step()
    assert facts(optimizer) == before
    step(optimizer, params)


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
@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("place", range(4))
def test_memory_taken_away_inside_is_lost_alone(wide, size, place):
    """An error says so; all other params and averages have their bits, torch's exchanges too."""
    params = [*parameters((3,), (4, 5), (7,)), nn.Parameter(torch.randn(20)[::2])]
    optimizer = stepped(params, average_dtype=wide)
    iterates, averages = [p.detach().clone() for p in params], averages_of(optimizer, params)
    shape = str(tuple(params[place].shape)).replace("(", r"\(").replace(")", r"\)")
    message = f"^averaged_parameters: the memory of .* {shape} was taken away inside"
    with pytest.raises(RuntimeError, match=message), optimizer.averaged_parameters():
        params[place].untyped_storage().resize_(size)
    for i, (p, iterate, ax) in enumerate(zip(params, iterates, averages, strict=True)):
        if i != place:
            same_values(p, iterate)
            same_values(optimizer.state[p]["ax"], ax)
    for p in params:
        p.grad = None
    optimizer.step()  # is possible again


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("of_average", [False, True], ids=["param", "average"])
def test_memory_taken_away_before_is_refused(wide, of_average):
    params = [*parameters((3,), (4, 5)), nn.Parameter(torch.randn(20)[::2])]
    optimizer = stepped(params, average_dtype=wide)
    for place in (2, 1):
        lost = optimizer.state[params[place]]["ax"] if of_average else params[place]
        lost.untyped_storage().resize_(4)
        kept = [(p, optimizer.state[p]["ax"]) for p in params[:place]]
        before = [(p.detach().clone(), ax.clone()) for p, ax in kept]
        with pytest.raises(RuntimeError, match=r"^averaged_parameters: .* was taken away$"):
            optimizer.averaged_parameters().__enter__()
        for pair, values in zip(kept, before, strict=True):
            for tensor, value in zip(pair, values, strict=True):
                same_values(tensor, value)


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_params_whose_data_is_replaced_inside_get_their_iterates(wide):
    """Exchanged with that of another param, or new."""
    params = [*parameters((5,), (5,), (4,)), nn.Parameter(torch.randn(10)[::2])]
    optimizer = stepped(params, average_dtype=wide)
    iterates, averages = [p.detach().clone() for p in params], averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        params[0].data, params[1].data = params[1].data, params[0].data
        params[2].data = torch.zeros(4)
    for p, iterate, ax in zip(params, iterates, averages, strict=True):
        same_values(p, iterate)
        same_values(optimizer.state[p]["ax"], ax)
