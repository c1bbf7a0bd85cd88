"""The state of ASGD: torch's, in both directions, live, and not shared with what it came from."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from twins import NAMES, Twins, parameters, same

from asgd_fast import ASGD

T0 = 4
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0, "weight_decay": 0.01}
SCALARS = ("step", "eta", "mu")


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(
    params=[
        saved_and_loaded,
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),
    ],
    ids=["torch.save", "deepcopy", "pickle"],
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("steps", range(T0 + 5))
def test_checkpoints_go_both_ways_at_any_moment(way, steps, dtype):
    twins = Twins(parameters((3,), (4, 2), (1,), dtype=dtype), **OPTIONS)
    twins.run(steps, skip=lambda k, i: i == 2 and k < 2)
    reference, theirs = continued(
        torch.optim.ASGD, twins.params, copy.deepcopy(twins.theirs.state_dict()), 5
    )
    for source, target in (
        (twins.ours, torch.optim.ASGD),
        (twins.theirs, ASGD),
        (twins.ours, ASGD),
    ):
        params, optimizer = continued(target, twins.params, way(source.state_dict()), 5)
        for p, q in zip(params, reference, strict=True):
            same(p, q)
            for name in NAMES:
                ours, wanted = optimizer.state[p][name], theirs.state[q][name]
                # torch widens eta and mu to the dtype of the param, with the values of float32
                same(ours.to(wanted.dtype), wanted)


def test_the_state_dict_has_torchs_form():
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(3)
    ours, theirs = twins.ours.state_dict(), twins.theirs.state_dict()
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert group == {**other, "foreach": None, "lr_schedule": "torch", "average_every": 1}
    assert ours["state"].keys() == theirs["state"].keys()
    for entry, other in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert list(entry) == list(other)
        for name in NAMES:
            same(entry[name], other[name])


def test_states_of_2020_are_taken():
    """With an int step, a float eta and an int mu, and groups without the later options."""
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(3)
    old = copy.deepcopy(twins.theirs.state_dict())
    for entry in old["state"].values():
        entry.update(step=3, eta=float(entry["eta"]), mu=1)
    for group in old["param_groups"]:
        for name in ("foreach", "maximize", "differentiable", "capturable"):
            del group[name]
    params, optimizer = continued(ASGD, twins.params, copy.deepcopy(old), 6)
    reference, theirs = continued(torch.optim.ASGD, twins.params, copy.deepcopy(old), 6)
    for p, q in zip(params, reference, strict=True):
        same(p, q)
        for name in NAMES:
            same(optimizer.state[p][name], theirs.state[q][name])


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


def test_a_loaded_state_shares_no_memory_with_its_source():
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(T0 + 3)
    for source in (twins.ours, twins.theirs):
        taken = source.state_dict()
        before = copy.deepcopy(taken)
        continued(ASGD, twins.params, taken, 3)
        for entry, other in zip(taken["state"].values(), before["state"].values(), strict=True):
            for name in NAMES:
                same(entry[name], other[name])


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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_go_on_alone(duplicate):
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(T0 + 2)
    other = duplicate(twins.ours)
    params = other.param_groups[0]["params"]
    twins.check()
    assert type(other) is ASGD
    assert repr(other) == repr(twins.ours)
    torch.manual_seed(0)
    grads = twins.random_grads()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    other.step()
    twins.step(grads)
    for p, q in zip(params, twins.theirs_params, strict=True):
        same(p, q)
        for name in NAMES:
            same(other.state[p][name], twins.theirs.state[q][name])
    twins.check()


def test_pickling_a_state_takes_no_more_room_for_more_params():
    """Plain pickle writes the whole memory behind each view."""

    def size(n):
        optimizer = ASGD(parameters(*[(1,)] * n))
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return len(pickle.dumps(optimizer.state_dict())) / n

    assert size(1000) < 1.5 * size(64)


def test_scalars_are_live_views_of_packed_tensors():
    params = parameters(*[(3,)] * 10)
    optimizer = ASGD(params, lr=0.5, lambd=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [optimizer.state[p][name] for p in params for name in SCALARS]
    assert len({x.untyped_storage().data_ptr() for x in held}) == 1
    assert all(x.dim() == 0 for x in held)
    optimizer.step()
    optimizer.step()
    assert all(
        x is optimizer.state[p][n]
        for x, (p, n) in zip(held, ((p, n) for p in params for n in SCALARS), strict=True)
    )
    assert held[0].item() == 3
    assert held[1].item() == float(torch.tensor(0.5 / (1 + 0.1 * 0.5 * 3) ** 0.75))


def test_scalars_may_be_written():
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(3)
    for optimizer, own in twins.sides:
        optimizer.state[own[0]]["eta"].fill_(0.05)
        optimizer.state[own[1]]["step"].add_(3)
        optimizer.state[own[1]]["mu"].mul_(0.5)
    twins.run(3)


def test_scalars_and_averages_may_be_replaced():
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(3)
    for _ in range(3):
        for optimizer, own in twins.sides:
            optimizer.state[own[0]]["eta"] = torch.tensor(0.05)
            optimizer.state[own[1]]["mu"] = torch.tensor(0.5)
            optimizer.state[own[1]]["ax"] = torch.full((4, 2), 2.0)
        twins.run(2)


def test_state_may_be_reset_or_replaced():
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(3)
    for optimizer, own in twins.sides:
        del optimizer.state[own[0]]
    twins.run(3)
    for optimizer, own in twins.sides:
        optimizer.state[own[1]] = {}
    twins.run(3)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.state = type(optimizer.state)(dict)
    twins.run(3)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.state.clear()
    twins.run(T0 + 3)


def test_a_state_may_pass_to_another_param():
    twins = Twins(parameters((3,), (3,)), **OPTIONS)
    twins.run(T0 + 2)
    for optimizer, own in twins.sides:
        state = optimizer.state
        state[own[0]], state[own[1]] = state[own[1]], state[own[0]]
    twins.run(3)


def test_groups_may_be_changed_by_hand():
    twins = Twins(parameters((3,), (4,), (5,)), **OPTIONS)
    twins.run(2)
    for optimizer, own in twins.sides:
        optimizer.param_groups[0]["params"] = [own[2], own[1]]
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": [own[0]], "lr": 1.0})
    twins.run(3)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups.pop()
    twins.run(2)


def test_groups_and_states_may_be_other_mappings():
    twins = Twins(parameters((3,), (4,)), lambda own: [OrderedDict(params=own, lr=0.3)], t0=2)
    twins.run(2)
    for optimizer, own in twins.sides:
        optimizer.param_groups = tuple(optimizer.param_groups)
        optimizer.param_groups[0]["params"] = tuple(own)
        optimizer.state[own[0]] = OrderedDict(optimizer.state[own[0]])
    twins.run(3)


def test_other_entries_of_a_state_are_kept():
    (p,) = params = parameters((3,))
    optimizer = ASGD(params)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p] = {"mine": [1, 2], **{n: optimizer.state[p][n] for n in reversed(NAMES)}}
    optimizer.step()
    assert optimizer.state[p]["mine"] == [1, 2]
    assert optimizer.state[p]["step"] == 2
    assert optimizer.state_dict()["state"][0]["mine"] == [1, 2]


def test_a_state_without_its_average_is_named():
    (p,) = params = parameters((3,))
    optimizer = ASGD(params)
    p.grad = torch.ones_like(p)
    optimizer.step()
    del optimizer.state[p]["ax"]
    before = p.detach().clone()
    with pytest.raises(KeyError, match="ax"):
        optimizer.step()
    same(p, before)


def test_an_average_of_another_shape_is_refused_before_anything_is_written():
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(2)
    q = twins.params[1]
    ax, twins.ours.state[q]["ax"] = twins.ours.state[q]["ax"], torch.zeros(5)
    twins.set_grads(twins.random_grads())
    with pytest.raises(ValueError, match=r"'ax' of shape \(5,\) does not match .* shape \(4,\)$"):
        twins.ours.step()
    twins.ours.state[q]["ax"] = ax
    twins.check()


def test_state_moved_to_shared_memory_is_followed():
    """As asynchronous training over processes does before the first real step."""
    twins = Twins(parameters((3,), (4, 2)), lazy_average=False, **OPTIONS)
    twins.run(2)
    for entry in twins.ours.state.values():
        for value in entry.values():
            value.share_memory_()
    twins.run(T0 + 2)
    assert all(x.is_shared() for entry in twins.ours.state.values() for x in entry.values())


def test_params_without_a_gradient_get_no_state():
    params = parameters((3,), (4,))
    optimizer = ASGD(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    target = ASGD(params)
    target.load_state_dict(ASGD(params).state_dict())
    assert not target.state


def test_what_is_dropped_is_freed():
    """Also where a param refers to its optimizer."""
    params = parameters((3,), (4,))
    optimizer = ASGD(params)
    for p in params:
        p.owner = optimizer
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    grad = weakref.ref(params[0].grad)
    params[0].grad = None
    assert grad() is None
    gone = [weakref.ref(x) for x in (optimizer, *params, optimizer.state[params[0]]["ax"])]
    del optimizer, params, p
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_a_replaced_average_is_freed():
    (p,) = params = parameters((3,))
    optimizer = ASGD(params)
    p.grad = torch.ones_like(p)
    optimizer.step()
    old = weakref.ref(optimizer.state[p]["ax"])
    optimizer.state[p]["ax"] = torch.zeros(3)
    optimizer.step()
    assert old() is None


def test_scalars_whose_memory_was_taken_away_are_refused():
    (p,) = params = parameters((3,))
    optimizer = ASGD(params)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["eta"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of step, eta and mu was taken away"):
        optimizer.step()
    same(p, before)


@pytest.mark.parametrize("n", [1, 5, 200])
def test_state_moved_by_its_data_is_followed(n):
    """As the helpers do that move an optimizer to a device and back."""
    twins = Twins(parameters(*[(3,)] * n), lr=0.3, lambd=0.1, t0=2)
    twins.run(3)
    for optimizer in (twins.ours, twins.theirs):
        for entry in optimizer.state.values():
            for value in entry.values():
                value.data = value.data.double().float()
    twins.run(4)


@pytest.mark.parametrize("name", SCALARS)
def test_one_scalar_with_other_memory_is_followed(name):
    twins = Twins(parameters((3,), (4,)), lr=0.3, lambd=0.1, t0=2)
    twins.run(3)
    for optimizer, own in twins.sides:
        optimizer.state[own[1]][name].set_(torch.tensor(0.5))
    twins.run(4)


def test_one_entry_for_two_params():
    twins = Twins(parameters((3,), (3,)), lr=0.3, lambd=0.1, t0=2)
    twins.run(3)
    for optimizer, own in twins.sides:
        optimizer.state[own[1]] = optimizer.state[own[0]]
    twins.run(3)


def test_a_count_below_zero():
    twins = Twins(parameters((3,)), lr=0.3, lambd=0.1, t0=2)
    twins.run(1)
    for optimizer, own in twins.sides:
        optimizer.state[own[0]]["step"].fill_(-1)
    twins.run(3)


@pytest.mark.parametrize("start", [2.0**24 - 2, 2.0**24])
def test_counts_as_far_as_float32_goes(start):
    twins = Twins(parameters((3,)), lr=0.3, lambd=1e-6, t0=2.0**24 - 5)
    twins.run(1)
    for optimizer, own in twins.sides:
        optimizer.state[own[0]]["step"].fill_(start)
    twins.run(5)


def test_double_scalars_are_rounded_as_torch_rounds_them():
    """Where they were made under another default dtype than the steps are under."""
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins(parameters((3,), dtype=torch.float64), lr=0.3, lambd=0.1, t0=1)
        twins.run(3)
    finally:
        torch.set_default_dtype(torch.float32)
    twins.run(5)
    assert twins.ours.state[twins.params[0]]["eta"].dtype == torch.float64


def test_a_state_loaded_in_inference_mode_is_of_use_outside():
    source = Twins([nn.Parameter(torch.randn(20)[::2]), *parameters((3,))], **OPTIONS)
    source.run(3)
    target = Twins([nn.Parameter(p.detach().clone()) for p in source.params], **OPTIONS)
    with torch.inference_mode():
        target.ours.load_state_dict(source.ours.state_dict())
    assert not any(x.is_inference() for entry in target.ours.state.values() for x in entry.values())
    target.theirs.load_state_dict(copy.deepcopy(source.theirs.state_dict()))
    target.run(3)


def test_an_average_within_a_larger_buffer_stays_there():
    p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    twins = Twins([p], **OPTIONS)
    twins.run(1)
    buffer = torch.zeros(200)
    twins.ours.state[p]["ax"] = buffer[10:106].view(2, 3, 4, 4)
    twins.step()
    assert torch.equal(buffer[10:106].view(2, 3, 4, 4), p)


def test_refused_steps_make_no_state():
    for spoil, error in (
        (lambda o, p: o.param_groups[0].update(lambd=-1), ValueError),
        (lambda o, p: setattr(p, "grad", torch.ones(3).to_sparse()), RuntimeError),
    ):
        old, fresh = parameters((3,), (3,))
        optimizer = ASGD([old, fresh])
        old.grad = torch.ones(3)
        optimizer.step()
        fresh.grad = torch.ones(3)
        spoil(optimizer, old)
        with pytest.raises(error):
            optimizer.step()
        assert list(optimizer.state) == [old]


def count_in_another_process(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()


def test_shared_state_is_shared_with_spawned_processes():
    params = parameters((3,))
    optimizer = ASGD(params)
    params[0].grad = torch.ones(3)
    optimizer.step()
    for x in (*params, *optimizer.state[params[0]].values()):
        x.share_memory_()
    process = torch.multiprocessing.get_context("spawn").Process(
        target=count_in_another_process, args=(optimizer,)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert optimizer.state[params[0]]["step"] == 4


def move(entry):
    """Give each tensor of a state other memory, as frameworks do that place states."""
    for value in entry.values():
        value.data = value.data.clone()


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_a_state_moved_while_a_group_is_added(lazy):
    twins = Twins(parameters((3,)), lazy_average=lazy, **OPTIONS)
    twins.run(2)
    for optimizer, own in twins.sides:
        move(optimizer.state[own[0]])
        own += parameters((4,), seed=1)
        optimizer.add_param_group({"params": [own[1]]})
    twins.run(T0 + 3)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("moved", range(1, 5))
def test_a_state_moved_while_a_param_gets_its_first_gradient(moved, lazy):
    twins = Twins(parameters(*[(3,)] * 10), lazy_average=lazy, **OPTIONS)
    twins.run(1, skip=lambda _, i: i == 9)
    for optimizer, own in twins.sides:
        move(optimizer.state[own[moved]])
    twins.run(T0 + 3)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_the_state_of_one_group_is_moved(lazy):
    """Noticed at once, however many params come before."""
    twins = Twins(
        parameters(*[(3,)] * 60),
        lambda own: [{"params": own[:30]}, {"params": own[30:]}],
        lazy_average=lazy,
        **OPTIONS,
    )
    twins.run(2)
    for optimizer, own in twins.sides:
        for p in own[30:]:
            move(optimizer.state[p])
    twins.run(T0 + 3)


def test_a_step_that_is_refused_leaves_no_state():
    for name, value, error in (("lr", -2.0, ValueError), ("weight_decay", "0.1", TypeError)):
        (p,) = parameters((3,))
        optimizer = ASGD([p], lambd=1.0)
        p.grad = torch.ones(3)
        optimizer.param_groups[0][name] = value
        with pytest.raises(error):
            optimizer.step()
        assert not optimizer.state
