"""Checkpoints and copies of ASGD: torch's form, to and from torch, sharing nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from runs import saved_and_loaded
from torch import nn
from twins import NAMES, Twins, entries_of, parameters, same, sealed_or_open

from asgd_fast import ASGD

T0 = 4
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0, "weight_decay": 0.01}
SCALARS = ("step", "eta", "mu")
STEPS = range(T0 + 5)

# Floats near whole numbers, which arithmetic arrives at, and such as have no fractions.
ODD_STARTS = [
    0.07 * 100,
    sum([0.1] * 50),
    3 + 2**-51,
    5 - 2**-50,
    5e-324,
    -1 + 2**-53,
    2.0**53,
    1e300,
]


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.fixture(
    params=[saved_and_loaded, copy.deepcopy, pickled], ids=["torch.save", "deepcopy", "pickle"]
)
def way(request):
    return request.param


def continued(optimizer_type, params, state_dict, steps):
    """Load a state into a new optimizer over copies of params, and step on."""
    params = copy.deepcopy(params)
    optimizer = optimizer_type(params, lr=9.0)  # all options are to come from the state
    optimizer.load_state_dict(state_dict)
    for k in range(steps):
        torch.manual_seed(k)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params, optimizer


def same_results(ours, theirs):
    """Assert that what two calls of `continued` return has the same bits."""
    both = (entries_of(optimizer).items() for _, optimizer in (ours, theirs))
    for (p, entry), (q, wanted) in zip(*both, strict=True):
        same(p, q)
        for name in NAMES:
            # torch widens eta and mu to the dtype of the param, with the values of float32
            same(entry[name].to(wanted[name].dtype), wanted[name])


@sealed_or_open
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_checkpoints_go_both_ways_at_any_moment(way, steps, dtype, looks):
    twins = Twins(parameters((3,), (4, 2), (1,), dtype=dtype), looks=looks, **OPTIONS)
    twins.run(steps, skip=lambda k, i: i == 2 and k < 2)
    theirs = continued(torch.optim.ASGD, twins.params, copy.deepcopy(twins.theirs.state_dict()), 5)
    for source, target in (
        (twins.ours, torch.optim.ASGD),
        (twins.theirs, ASGD),
        (twins.ours, ASGD),
    ):
        same_results(continued(target, twins.params, way(source.state_dict()), 5), theirs)


@sealed_or_open
@pytest.mark.parametrize("to_torch", [True, False], ids=["to torch", "from torch"])
@pytest.mark.parametrize("steps", STEPS)
def test_checkpoints_replace_a_state_in_use(steps, to_torch, looks):
    twins = Twins(parameters((3,), (4, 5)), looks=looks, **OPTIONS)
    twins.run(steps)
    saved = saved_and_loaded((twins.ours if to_torch else twins.theirs).state_dict())
    (twins.theirs if to_torch else twins.ours).load_state_dict(saved)
    twins.check()
    twins.run(T0 + 5)


@pytest.mark.parametrize("t0", ODD_STARTS)
@pytest.mark.parametrize("copies", [False, True], ids=["loaded", "copied"])
@pytest.mark.parametrize("steps", [1, 3, T0 + 5])
def test_averaging_begins_at_t0_whatever_its_last_bits(steps, copies, t0, way):
    twins = Twins(parameters((3,), (4,)), t0=t0)
    twins.run(steps, lambda k, i: i == 1 and k < 2)
    if copies:
        both = twins.params, twins.ours, twins.theirs_params, twins.theirs
        twins.params, twins.ours, twins.theirs_params, twins.theirs = copy.deepcopy(both)
    else:
        for optimizer in (twins.ours, twins.theirs):
            optimizer.load_state_dict(way(optimizer.state_dict()))
    assert twins.ours.param_groups[0]["t0"] == t0
    twins.run(T0 + 5)


@sealed_or_open
def test_the_state_dict_has_torchs_form(looks):
    twins = Twins(parameters((3,), (4, 2)), looks=looks, **OPTIONS)
    twins.run(3)
    ours, theirs = twins.ours.state_dict(), twins.theirs.state_dict()
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert group == {**other, "foreach": None}
    assert ours["state"].keys() == theirs["state"].keys()
    for entry, other in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert type(entry) is dict
        assert list(entry) == list(other)


def plain_numbers(entry):
    """As torch had it in 2020: an int step, a float eta and an int mu."""
    entry.update(step=int(entry["step"]), eta=float(entry["eta"]), mu=int(entry["mu"]))


@pytest.mark.parametrize("edit", [lambda _: None, plain_numbers], ids=["tensors", "numbers"])
@pytest.mark.parametrize("steps", [1, T0, T0 + 1])
def test_groups_without_the_later_options_are_taken(steps, edit):
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(steps)
    old = copy.deepcopy(twins.theirs.state_dict())
    for entry in old["state"].values():
        edit(entry)
    for group in old["param_groups"]:
        for name in ("foreach", "maximize", "differentiable", "capturable"):
            del group[name]
    same_results(
        *(continued(kind, twins.params, copy.deepcopy(old), 6) for kind in (ASGD, torch.optim.ASGD))
    )


@pytest.mark.parametrize("steps", STEPS)
def test_an_optimizer_pickled_by_the_version_before_sealed_states(steps):
    """Its entries were plain dicts, whose averages were the memory of their params at first."""
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(steps)
    old = {
        "defaults": dict(twins.ours.defaults),
        "state": {},
        "param_groups": [{**twins.ours.param_groups[0], "params": twins.params}],
        "lazy_average": True,
        "average_dtype": None,
        "_own_defaults": {"lr_schedule": "torch", "average_every": 1},
        "_on_device": False,
    }
    for p, q in zip(twins.params, twins.theirs_params, strict=True):
        if q in twins.theirs.state:
            entry = twins.theirs.state[q]
            ax = entry["ax"].clone() if entry["mu"] != 1 else p.detach()
            old["state"][p] = {**{name: entry[name].clone() for name in SCALARS}, "ax": ax}
    old = pickled(old)
    twins.ours = ASGD.__new__(ASGD)
    twins.ours.__setstate__(old)
    twins.params = old["param_groups"][0]["params"]
    twins.check()
    twins.run(T0 + 5)


@pytest.mark.parametrize("steps", STEPS)
def test_a_checkpoint_of_the_version_before_sealed_states(steps, way):
    """Its scalars were views of one tensor, and its averages were copies."""
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(steps)
    old = copy.deepcopy(twins.theirs.state_dict())
    packed = torch.zeros(len(old["state"]), 3)
    for i, entry in old["state"].items():
        for k, name in enumerate(SCALARS):
            entry[name] = packed[i, k].fill_(entry[name])
    for group in old["param_groups"]:
        group.update(lr_schedule="torch", average_every=1, foreach=None)
    twins.ours.load_state_dict(way(old))
    twins.check()
    twins.run(T0 + 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eta_and_mu_are_not_squeezed_into_half_types(dtype):
    source = ASGD(parameters((5,), dtype=dtype), lr=0.1, t0=0)
    (p,) = source.param_groups[0]["params"]
    for _ in range(4):
        p.grad = torch.ones_like(p)
        source.step()
    target = ASGD(parameters((5,), dtype=dtype))
    target.load_state_dict(saved_and_loaded(source.state_dict()))
    (q,) = target.param_groups[0]["params"]
    for name in SCALARS:
        same(target.state[q][name], source.state[p][name])
    assert target.state[q]["mu"].item() == float(torch.tensor(1 / 4))


def test_double_scalars_survive_a_process_with_single_ones(double_scalars):
    source = ASGD(parameters((5,)), lr=0.1)
    (p,) = source.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    source.step()
    torch.set_default_dtype(torch.float32)
    target = ASGD(parameters((5,)))
    target.load_state_dict(source.state_dict())
    (q,) = target.param_groups[0]["params"]
    for name in SCALARS:
        same(target.state[q][name], source.state[p][name])
    assert target.state[q]["eta"].item() != float(target.state[q]["eta"].float())


@sealed_or_open
@pytest.mark.parametrize("steps", [1, T0 + 3])
def test_a_loaded_state_shares_no_memory_with_its_source(steps, looks):
    twins = Twins(parameters((3,), (4, 2)), looks=looks, **OPTIONS)
    twins.run(steps)
    for source in (twins.ours, twins.theirs):
        taken = source.state_dict()
        before = copy.deepcopy(taken)
        continued(ASGD, twins.params, taken, T0)
        for entry, other in zip(taken["state"].values(), before["state"].values(), strict=True):
            for name in NAMES:
                same(entry[name], other[name])


@pytest.mark.parametrize(
    "state_dict",
    [ASGD.state_dict, torch.optim.Optimizer.state_dict, lambda o: copy.deepcopy(o).state_dict()],
    ids=["state_dict", "torch's own method", "of a copy"],
)
def test_an_average_that_has_not_begun_is_saved_as_a_copy(state_dict):
    """Of the param as it stands, with whatever memory it has by now."""
    p = nn.Parameter(torch.ones(3))
    optimizer = ASGD([p], lr=0.1, lambd=0.0)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, given: seen.append(given))
    p.grad = torch.ones(3)
    optimizer.step()
    p.data = torch.full((3,), 2.0)
    ax = state_dict(optimizer)["state"][0]["ax"]
    if seen:
        assert seen[0]["state"][0]["ax"] is ax
    optimizer.step()
    same(ax, torch.full((3,), 2.0))
    assert "ax" not in optimizer.state[p]


def test_load_hooks_see_the_dict_and_may_replace_it():
    source = Twins(parameters((3,)), **OPTIONS)
    source.run(3)
    optimizer = ASGD(source.params)
    seen = []

    def replace(opt, state_dict):
        assert opt is optimizer
        seen.append(type(state_dict["state"][0]["eta"]))
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["eta"].fill_(0.125)
        return state_dict

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[source.params[0]]["eta"].item())
    )
    optimizer.load_state_dict(source.ours.state_dict())
    optimizer.load_state_dict(source.ours.state_dict())
    assert seen == [torch.Tensor, 0.125] * 2


def test_a_state_of_other_groups_is_refused():
    source = ASGD(parameters((3,)))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ASGD([{"params": p} for p in parameters((3,), (4,))]).load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        ASGD(parameters((3,), (4,))).load_state_dict(source.state_dict())


def test_a_checkpoint_of_no_steps_makes_no_state():
    params = parameters((3,), (4,))
    target = ASGD(params)
    target.load_state_dict(ASGD(params).state_dict())
    assert not target.state


def test_an_average_in_another_layout_is_taken():
    channels_last = parameters((2, 3, 4, 4))[0].detach().to(memory_format=torch.channels_last)
    source = Twins([nn.Parameter(channels_last)], **OPTIONS)
    source.run(T0 + 2)
    contiguous = nn.Parameter(
        source.params[0].detach().clone(memory_format=torch.contiguous_format)
    )
    ours, optimizer = continued(ASGD, [contiguous], source.ours.state_dict(), 3)
    theirs, reference = continued(torch.optim.ASGD, [contiguous], source.theirs.state_dict(), 3)
    same(ours[0], theirs[0])
    assert torch.equal(optimizer.state[ours[0]]["ax"], reference.state[theirs[0]]["ax"])
    assert optimizer.state[ours[0]]["ax"].stride() == ours[0].stride()


def reloaded(sides):
    params, ours, theirs_params, theirs = sides
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return params, ours, theirs_params, theirs


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, reloaded])
def test_an_average_that_begins_as_mu_is_set_by_hand_is_in_copies(duplicate):
    twins = Twins(parameters((3,), (4, 2)), lr=0.1, lambd=0.01, t0=100)
    twins.run(3)
    for optimizer, own in twins.sides:
        optimizer.state[own[0]]["mu"].fill_(0.5)
    sides = duplicate((twins.params, twins.ours, twins.theirs_params, twins.theirs))
    twins.params, twins.ours, twins.theirs_params, twins.theirs = sides
    twins.check()
    (p, _), (q, _) = twins.params, twins.theirs_params
    same(twins.ours.state[p]["ax"], twins.theirs.state[q]["ax"])
    twins.run(3)


@sealed_or_open
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_of_the_optimizer_go_on_alone(duplicate, steps, lazy, looks):
    twins = Twins(parameters((3,), (4, 2)), lazy_average=lazy, looks=looks, **OPTIONS)
    twins.run(steps)
    others = duplicate((twins.params, twins.ours, twins.theirs_params, twins.theirs))
    assert type(others[1]) is ASGD
    assert repr(others[1]) == repr(twins.ours)
    twins.run(3)
    for entry in others[1].state.values():
        assert ("ax" in entry) == (steps >= T0 + 2 or not lazy)
    twins.params, twins.ours, twins.theirs_params, twins.theirs = others
    twins.run(T0 + 5)


def test_pickling_a_state_takes_no_more_room_for_more_params():
    """Plain pickle writes the whole memory behind each view."""

    def size(n):
        optimizer = ASGD(parameters(*[(1,)] * n))
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return len(pickle.dumps(optimizer.state_dict())) / n

    assert size(1000) < 1.5 * size(64)


def test_a_state_loaded_in_inference_mode_is_of_use_outside():
    source = Twins([nn.Parameter(torch.randn(20)[::2]), *parameters((3,))], **OPTIONS)
    source.run(3)
    target = Twins([nn.Parameter(p.detach().clone()) for p in source.params], **OPTIONS)
    with torch.inference_mode():
        target.ours.load_state_dict(source.ours.state_dict())
    assert not any(x.is_inference() for entry in target.ours.state.values() for x in entry.values())
    target.theirs.load_state_dict(copy.deepcopy(source.theirs.state_dict()))
    target.run(3)


@pytest.mark.parametrize("more", [{}, {"note": 1}], ids=["", "another entry"])
def test_an_average_that_a_checkpoint_lacks_goes_on_from_the_param(more):
    twins = Twins(parameters((3,), (2, 4)), **OPTIONS)
    twins.run(len(STEPS))
    state = copy.deepcopy(twins.ours.state_dict())
    for p, q in zip(twins.params, twins.theirs_params, strict=True):
        twins.theirs.state[q]["ax"] = p.detach().clone()
    for entry in state["state"].values():
        del entry["ax"]
        entry.update(more)
    twins.ours.load_state_dict(state)
    twins.step()
    for p, q in zip(twins.params, twins.theirs_params, strict=True):
        same(p, q)
        same(twins.ours.state[p]["ax"], twins.theirs.state[q]["ax"])
