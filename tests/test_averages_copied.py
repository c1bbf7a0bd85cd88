"""Averages copied: copy_averages_to() into models and tensors, averaged_state_dict() to ship."""

from __future__ import annotations

import copy

import pytest
import torch
from averaging import (
    OPTIONS,
    STEPS,
    averages_of,
    facts,
    model_with_batch_norm,
    step,
    stepped,
    trained,
)
from torch import nn
from torch.optim.swa_utils import update_bn
from twins import parameters, same

from asgd_fast import ASGD

pytestmark = pytest.mark.usefixtures("seeded")


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


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_copied_inside_the_context(wide, moved):
    """Which loses no average, and finds them when the params get other memory meanwhile."""
    params = parameters((3,), (4, 5))
    optimizer = stepped(params, average_dtype=wide)
    outside, inside = ([torch.zeros_like(p).double() for p in params] for _ in range(2))
    optimizer.copy_averages_to(outside)
    before = averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        for p in params if moved else ():
            p.data = torch.full_like(p, 7)
        optimizer.copy_averages_to(inside)
    for one, other in zip(outside, inside, strict=True):
        same(one, other)
    for p, ax in zip(params, before, strict=True):
        same(optimizer.state[p]["ax"], ax)


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


def compiled(model):
    return torch.compile(model, backend="eager")


class Holder(nn.Module):
    """A model with a submodule that is wrapped."""

    def __init__(self, part):
        super().__init__()
        self.part = part


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda model: compiled(nn.DataParallel(model)),
    "parallel compiled": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("where", ["whole", "part"])
@pytest.mark.parametrize("to", WRAPPERS)
@pytest.mark.parametrize("by", WRAPPERS)
def test_names_match_without_those_of_wrappers(by, to, where):
    """Between models that differ by their wrappers alone; what is shipped fits the plain one."""

    def wrapped(model, how):
        return how(Holder(model)) if where == "whole" else Holder(how(model))

    model, other = (wrapped(m, WRAPPERS[w]) for m, w in ((Straight(), by), (Turned(), to)))
    params = dict(model.named_parameters())
    optimizer = ASGD(params.items(), **OPTIONS)
    for k in range(STEPS):
        step(optimizer, list(params.values()), k)
    optimizer.copy_averages_to(other)
    own = {name.replace("module.", "").replace("_orig_mod.", ""): p for name, p in params.items()}
    for name, q in other.named_parameters():
        plain = name.replace("module.", "").replace("_orig_mod.", "")
        same(q, optimizer.state[own[plain]]["ax"])
    shipped = optimizer.averaged_state_dict(model)
    plain = Holder(Straight())
    plain.load_state_dict(shipped)
    assert shipped._metadata == plain.state_dict()._metadata
    for name, q in plain.named_parameters():
        same(q, optimizer.state[own[name]]["ax"])


def test_names_of_the_users_own_stay():
    """A submodule called "module" is no wrapper; where names become the same, they must match."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(3, 3)
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.bias = nn.Parameter(torch.randn(3))

    model = Own()
    optimizer = ASGD(model.named_parameters(), **OPTIONS)
    for k in range(STEPS):
        step(optimizer, list(model.parameters()), k)
    assert optimizer.averaged_state_dict(model).keys() == model.state_dict().keys()
    for other in (Own(), compiled(Own())):
        optimizer.copy_averages_to(other)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            same(q, optimizer.state[p]["ax"])
    for target in (
        nn.DataParallel(Own()),
        nn.Linear(3, 3),
        nn.ModuleDict({"module": nn.Linear(3, 3)}),
    ):
        before = [q.detach().clone() for q in target.parameters()]
        with pytest.raises(ValueError, match=r"^target: has no parameters named \["):
            optimizer.copy_averages_to(target)
        for q, value in zip(target.parameters(), before, strict=True):
            same(q, value)
