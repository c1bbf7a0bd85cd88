"""The entries of ASGD's state: whatever others read, write, replace or rebuild, steps follow."""

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
from twins import NAMES, Twins, parameters, same, sealed_or_open

from asgd_fast import ASGD, _core

T0 = 4
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0, "weight_decay": 0.01}
SCALARS = ("step", "eta", "mu")
BEGUN = T0 + 3  # as many steps as leave averages that have begun
lazy_or_eager = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


def test_scalars_that_are_held_stay_the_same_objects_with_torchs_values():
    twins = Twins(parameters(*[(3,)] * 10), **OPTIONS)
    twins.run(1)
    held = [[o.state[p][name] for p in own for name in SCALARS] for o, own in twins.sides]
    for _ in range(BEGUN):
        twins.run(1)
        now = [twins.ours.state[p][name] for p in twins.params for name in SCALARS]
        for ours, theirs, x in zip(*held, now, strict=True):
            assert x is ours
            same(ours, theirs)


@lazy_or_eager
def test_averages_that_are_held_stay_the_same_objects_with_torchs_values(lazy):
    twins = Twins(parameters((3,), (4, 5)), lazy_average=lazy, **OPTIONS)
    twins.run(T0 + 2 if lazy else 1)
    held = [[o.state[p]["ax"] for p in own] for o, own in twins.sides]
    for _ in range(BEGUN):
        twins.run(1)
        for ours, theirs, p in zip(*held, twins.params, strict=True):
            assert twins.ours.state[p]["ax"] is ours
            same(ours, theirs)


def shown(entry):
    """The entries of a dict in a form that can be compared."""
    return {name: repr(value) for name, value in entry.items()}


DICT_METHODS = {
    "len": len,
    "bool": bool,
    "in": lambda x: [name in x for name in (*NAMES, "other")],
    "iter": lambda x: [*x],
    "reversed": lambda x: [*reversed(x)],
    "==": lambda x: x == dict(x),
    "== of a dict": lambda x: {**x} == x,
    "!=": lambda x: x != {},
    "|": lambda x: shown(x | {"other": 1}),
    "| of a dict": lambda x: shown({"other": 1} | x),
    "|=": lambda x: shown(x.__ior__({"other": 1})),
    "update of a dict": lambda x: (lambda d: d.update(x) or shown(d))({}),
    "[]": lambda x: [x[name].tolist() for name in NAMES],
    "get": lambda x: [x.get(name, torch.ones(())).tolist() for name in (*SCALARS, "other")],
    "pop": lambda x: x.pop("eta").tolist(),
    "popitem": lambda x: x.popitem()[1].tolist(),
    "setdefault": lambda x: x.setdefault("mu", 3).tolist(),
    "update": lambda x: x.update(other=1) or shown(x),
    "[] =": lambda x: x.__setitem__("other", 1) or shown(x),
    "del": lambda x: x.__delitem__("mu") or shown(x),
    "items": lambda x: repr(sorted(x.items())),
    "keys": lambda x: set(x.keys()),
    "values": lambda x: [value.tolist() for value in x.values()],
    "copy": lambda x: shown(x.copy()),
    "clear": lambda x: x.clear() or shown(x),
    "repr": repr,
    "dict": lambda x: shown(dict(x)),
}


@pytest.mark.parametrize("method", DICT_METHODS.values(), ids=DICT_METHODS)
def test_each_method_of_dict_finds_the_entries_that_torch_has(method):
    twins = Twins(parameters((3,)), **OPTIONS)
    twins.run(BEGUN)
    ours, theirs = (o.state[own[0]] for o, own in twins.sides)
    assert method(ours) == method(theirs)
    assert shown(ours) == shown(theirs)


@pytest.mark.parametrize("method", DICT_METHODS.values(), ids=DICT_METHODS)
def test_what_was_read_by_a_method_of_dict_stays_live(method):
    """The first that looks into an entry gets the tensors that all later ones get."""
    twins = Twins(parameters((3,)), **OPTIONS)
    twins.run(BEGUN)
    entry = twins.ours.state[twins.params[0]]
    method(entry)
    held = {**entry}
    if held.keys() < {*NAMES}:  # the method has taken some
        return
    twins.step()
    for name in NAMES:
        assert entry[name] is held[name]
        same(held[name], twins.theirs.state[twins.theirs_params[0]][name])


def torch_saved(entry):
    file = io.BytesIO()
    torch.save(entry, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


REBUILT = {
    "type(entry)": lambda x: type(x)({**x}),
    "**": lambda x: {**x},
    "dict": dict,
    "OrderedDict": OrderedDict,
    "copy": lambda x: x.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": torch_saved,
    "clone of each": lambda x: {k: v.clone() for k, v in x.items()},
    "reordered": lambda x: {k: x[k] for k in reversed(NAMES)},
    "with more": lambda x: {"mine": [1, 2], **x},
}


@sealed_or_open
@pytest.mark.parametrize("steps", [1, T0 + 1, T0 + 2, BEGUN])
@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_entries_that_are_rebuilt_go_on(rebuild, steps, looks):
    twins = Twins(parameters((3,), (4, 2)), **OPTIONS)
    twins.run(steps)
    for _ in range(BEGUN):
        if looks:
            assert all(len(entry) >= 3 for entry in twins.ours.state.values())
        p = twins.params[1]
        twins.ours.state[p] = rebuild(twins.ours.state[p])
        more = {"mine": [1, 2]} if "mine" in twins.ours.state[p] else {}
        twins.step()
        for (_, ours), (_, theirs) in zip(*(o.state.items() for o, _ in twins.sides), strict=True):
            for name in NAMES:
                same(ours[name], theirs[name])
        for p, q in zip(twins.params, twins.theirs_params, strict=True):
            same(p, q)
        assert more.items() <= twins.ours.state[twins.params[1]].items()
        assert more.items() <= twins.ours.state_dict()["state"][1].items()


def test_an_entry_that_was_copied_is_another_ones():
    twins = Twins(parameters((3,)), **OPTIONS)
    twins.run(BEGUN)
    entry = copy.deepcopy(twins.ours.state[twins.params[0]])
    for name in NAMES:
        entry[name].fill_(9.0)
    twins.run(3)


def written(optimizer, p, q):
    optimizer.state[p]["eta"].fill_(0.05)
    optimizer.state[q]["step"].add_(3)
    optimizer.state[q]["mu"].mul_(0.5)


def replaced(optimizer, p, q):
    optimizer.state[p]["eta"] = torch.tensor(0.05)
    optimizer.state[q]["mu"] = torch.tensor(0.5)
    optimizer.state[q]["ax"] = torch.full((3,), 2.0)


def deleted(optimizer, p, q):
    del optimizer.state[p]


def emptied(optimizer, p, q):
    optimizer.state[q].clear()


def given_an_empty_dict(optimizer, p, q):
    optimizer.state[q] = {}


def all_made_anew(optimizer, p, q):
    optimizer.state = type(optimizer.state)(dict)


def all_cleared(optimizer, p, q):
    optimizer.state.clear()


def exchanged(optimizer, p, q):
    optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]


def one_for_both(optimizer, p, q):
    optimizer.state[q] = optimizer.state[p]


def set_below_zero(optimizer, p, q):
    optimizer.state[p]["step"].fill_(-1)


def set_by_data(optimizer, p, q):
    for value in optimizer.state[q].values():
        value.data = value.data.double().float()


def set_by_set_(optimizer, p, q):
    for name in SCALARS:
        optimizer.state[q][name].set_(torch.tensor(0.5))


EDITS = (
    *(written, replaced, deleted, emptied, given_an_empty_dict, all_made_anew, all_cleared),
    *(exchanged, one_for_both, set_below_zero, set_by_data, set_by_set_),
)


@sealed_or_open
@lazy_or_eager
@pytest.mark.parametrize("steps", [1, T0 + 1, BEGUN])
@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
def test_states_may_be(edit, steps, lazy, looks):
    twins = Twins(parameters((3,), (3,)), lazy_average=lazy, looks=looks, **OPTIONS)
    twins.run(steps)
    for _ in range(2):
        for optimizer, own in twins.sides:
            edit(optimizer, *own)
        twins.run(3)
    twins.run(BEGUN)


PUT = {
    "replaced": lambda entry, name, value: entry.__setitem__(name, torch.tensor(value)),
    "written": lambda entry, name, value: entry[name].fill_(value),
    "data": lambda entry, name, value: setattr(entry[name], "data", torch.tensor(value)),
    "set_": lambda entry, name, value: entry[name].set_(torch.tensor(value)),
    "number": lambda entry, name, value: entry.__setitem__(name, value),
    "double": lambda entry, name, value: entry.__setitem__(name, torch.tensor(value).double()),
    "one element": lambda entry, name, value: entry.__setitem__(name, torch.tensor([value])),
}


@sealed_or_open
@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("put", PUT.values(), ids=PUT)
def test_a_scalar_put_in_among_200_params_acts_in_the_very_next_step(put, name, looks):
    twins = Twins(parameters(*[(3,)] * 200), looks=looks, lr=0.3, lambd=0.1, t0=2)
    twins.run(2)
    for i in (0, 100, 199):
        put(twins.ours.state[twins.params[i]], name, 0.25)
        twins.theirs.state[twins.theirs_params[i]][name].fill_(0.25)
    for _ in range(3):
        twins.step()
        for p, q in zip(twins.params, twins.theirs_params, strict=True):
            same(p, q)
            ours, theirs = twins.ours.state[p], twins.theirs.state[q]
            same(ours["ax"], theirs["ax"])
            assert [float(ours[x]) for x in SCALARS] == [float(theirs[x]) for x in SCALARS]


def moved(entry):
    """Give each tensor of a state other memory, as frameworks do that place states."""
    for value in entry.values():
        value.data = value.data.clone()


@lazy_or_eager
@pytest.mark.parametrize("steps", [2, BEGUN])
@pytest.mark.parametrize("place", [*range(4), slice(30, 60)], ids=str)
def test_states_moved_while_others_come_into_being(place, steps, lazy):
    twins = Twins(
        parameters(*[(3,)] * 60),
        lambda own: [{"params": own[:30]}, {"params": own[30:]}],
        lazy_average=lazy,
        **OPTIONS,
    )
    twins.run(steps, skip=lambda _, i: i == 29)  # which gets its first gradient next
    for optimizer, own in twins.sides:
        for p in own[place] if isinstance(place, slice) else [own[place]]:
            moved(optimizer.state[p])
        own += parameters((4,), seed=1)
        optimizer.add_param_group({"params": [own[-1]]})
    twins.run(T0 + 3)


@sealed_or_open
def test_the_t0_of_an_entry_stands_instead_of_its_groups(looks):
    def groups(own):
        return [{"params": [p]} for p in own]

    twins = Twins(parameters((3,), (4,)), groups, **OPTIONS)
    twins.run(1)
    twins.ours.state[twins.params[1]]["t0"] = 1.0
    twins.theirs.param_groups[1]["t0"] = 1.0
    if not looks:
        twins.ours.load_state_dict(twins.ours.state_dict())
    for _ in range(BEGUN):
        twins.step()
        entries = twins.ours.state_dict()["state"].values()
        for entry, q in zip(entries, twins.theirs_params, strict=True):
            for name in NAMES:
                same(entry[name], twins.theirs.state[q][name])


@sealed_or_open
def test_groups_may_be_changed_by_hand(looks):
    twins = Twins(parameters((3,), (4,), (5,)), looks=looks, **OPTIONS)
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


class Doubled(dict):
    """A group that answers twice its weight decay, and minimizes though it does not say so."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        return 2 * value if name == "weight_decay" else value

    def __missing__(self, name):
        return {"maximize": False}[name]


def test_groups_are_read_by_their_own_methods():
    gapped = torch.ones(8)[::2].detach().requires_grad_()  # which torch's own function updates
    twins = Twins(
        [*parameters((3,)), gapped], lambda own: [Doubled(params=own, weight_decay=0.1)], t0=1
    )
    for optimizer, _ in twins.sides:
        del optimizer.param_groups[0]["maximize"]
    twins.run(4)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_lacks_an_entry_is_named_and_nothing_is_changed(name):
    p, q = params = parameters((3,), (4,))
    optimizer = ASGD(params, t0=0)
    for _ in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(4)
        optimizer.step()
    del optimizer.state[q][name]
    before = copy.deepcopy([p, q, *map(dict, optimizer.state.values())])
    with pytest.raises(KeyError, match=name):
        optimizer.step()
    assert repr([p, q, *map(dict, optimizer.state.values())]) == repr(before)


def test_an_average_of_another_shape_is_refused_before_anything_is_written():
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(BEGUN)
    q = twins.params[1]
    ax, twins.ours.state[q]["ax"] = twins.ours.state[q]["ax"], torch.zeros(5)
    twins.set_grads(twins.random_grads())
    with pytest.raises(ValueError, match=r"'ax' of shape \(5,\) does not match .* shape \(4,\)$"):
        twins.ours.step()
    twins.ours.state[q]["ax"] = ax
    twins.check()


SPOILT = {
    "lambd": (ValueError, lambda o, p: o.param_groups[0].update(lambd=-1)),
    "lr": (ValueError, lambda o, p: o.param_groups[0].update(lr=-2.0, lambd=1.0)),
    "weight_decay": (TypeError, lambda o, p: o.param_groups[0].update(weight_decay="0.1")),
    "sparse": (RuntimeError, lambda o, p: setattr(p, "grad", torch.ones(3).to_sparse())),
}


@pytest.mark.parametrize("steps", [0, 1, T0 + 1], ids="after {}".format)
@pytest.mark.parametrize(("error", "spoil"), SPOILT.values(), ids=SPOILT)
def test_a_step_that_is_refused_makes_no_state_and_begins_no_average(error, spoil, steps):
    old, fresh = parameters((3,), (3,))
    optimizer = ASGD([old, fresh], **OPTIONS)
    for _ in range(steps):
        old.grad = torch.ones(3)
        optimizer.step()
    old.grad = fresh.grad = torch.ones(3)
    spoil(optimizer, old)
    with pytest.raises(error):
        optimizer.step()
    assert list(optimizer.state) == [old] * (steps > 0)
    assert not any("ax" in entry for entry in optimizer.state.values())


def test_params_without_a_gradient_get_no_state():
    params = parameters((3,), (4,))
    optimizer = ASGD(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]


@sealed_or_open
def test_what_is_dropped_is_freed(looks):
    """Also where a param refers to its optimizer."""
    params = parameters((3,), (4,))
    optimizer = ASGD(params, t0=0)
    for p in params:
        p.owner = optimizer
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    grad = weakref.ref(params[0].grad)
    params[0].grad = None
    assert grad() is None
    gone = [weakref.ref(x) for x in (optimizer, *params)]
    if looks:
        gone += map(weakref.ref, optimizer.state[params[0]].values())
    del optimizer, params, p
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_a_replaced_average_is_freed():
    (p,) = params = parameters((3,))
    optimizer = ASGD(params, lazy_average=False)
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


@sealed_or_open
@pytest.mark.parametrize("start", [2.0**24 - 2, 2.0**24])
def test_counts_as_far_as_float32_goes(start, looks):
    twins = Twins(parameters((3,)), lr=0.3, lambd=1e-6, t0=2.0**24 - 5)
    twins.run(1)
    for optimizer, own in twins.sides:
        optimizer.state[own[0]]["step"].fill_(start)
    if not looks:
        twins.ours.load_state_dict(twins.ours.state_dict())
    twins.run(5)


@sealed_or_open
def test_double_scalars_are_rounded_as_torch_rounds_them(looks):
    """Where they were made under another default dtype than the steps are under."""
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins(parameters((3,), dtype=torch.float64), looks=looks, lr=0.3, lambd=0.1, t0=1)
        twins.run(3)
    finally:
        torch.set_default_dtype(torch.float32)
    twins.run(5)
    assert twins.ours.state[twins.params[0]]["eta"].dtype == torch.float64


def test_an_average_within_a_larger_buffer_stays_there():
    p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    twins = Twins([p], **OPTIONS)
    twins.run(1)
    buffer = torch.zeros(200)
    twins.ours.state[p]["ax"] = buffer[10:106].view(2, 3, 4, 4)
    twins.step()
    assert torch.equal(buffer[10:106].view(2, 3, 4, 4), p)


def versions_counted(optimizer_class):
    """How often torch is told of writes to scalars, in a step that goes to torch's function."""
    (p,) = parameters((3,))
    optimizer = optimizer_class([p], t0=0)
    for _ in range(4):
        p.grad = torch.ones(3)
        optimizer.step()
    entry = optimizer.state[p]
    entry["ax"] = torch.stack([entry["ax"]] * 2, 1)[:, 0]  # in a layout that no engine takes
    before = [entry[name]._version for name in ("step", "eta", "mu")]
    optimizer.step()
    after = [optimizer.state[p][name]._version for name in ("step", "eta", "mu")]
    return [new - old for new, old in zip(after, before, strict=True)]


def test_a_write_to_a_scalar_counts_once_where_torch_makes_it():
    assert versions_counted(ASGD) == versions_counted(torch.optim.ASGD)


def test_state_moved_to_shared_memory_is_followed():
    """As asynchronous training over processes does before the first real step."""
    twins = Twins(parameters((3,), (4, 2)), lazy_average=False, **OPTIONS)
    twins.run(2)
    for entry in twins.ours.state.values():
        for value in entry.values():
            value.share_memory_()
    twins.run(T0 + 2)
    assert all(x.is_shared() for entry in twins.ours.state.values() for x in entry.values())


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


def test_states_that_another_thread_looks_at_during_the_update_show_the_step(monkeypatch):
    """The update releases the GIL."""
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(2)
    held = {}
    update = _core.update

    def looked_at(*args):
        held.update((p, twins.ours.state[p]["step"]) for p in twins.params[:1])
        update(*args)

    monkeypatch.setattr(_core, "update", looked_at)
    twins.run(1)
    monkeypatch.undo()
    assert held[twins.params[0]] == 3
    twins.run(T0 + 2)
    assert held[twins.params[0]] == T0 + 5


def test_scalars_are_the_hosts_whatever_the_default_device_is():
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(2)
    with torch.device("meta"):
        twins.look()
        scalars = twins.ours.state_dict()["state"][1]
    assert {scalars[name].device.type for name in SCALARS} == {"cpu"}
    twins.run(T0 + 2)


def test_states_looked_at_in_inference_mode_can_be_started_outside():
    params = parameters((3,), (4,))
    optimizer = ASGD(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.inference_mode():
        assert optimizer.state[params[1]]["mu"] == 1
    optimizer.start_averaging()
    optimizer.step()
    assert all("ax" in optimizer.state[p] for p in params)


def test_a_shallow_copy_leaves_the_original_as_it_is():
    twins = Twins(parameters((3,)), **OPTIONS)
    twins.run(1)
    step = twins.ours.state[twins.params[0]]["step"]
    copy.copy(twins.ours)
    twins.run(1)
    assert step == 2


def test_one_dict_for_two_params_without_its_average_is_named():
    params = parameters((3,), (3,))
    optimizer = ASGD(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    shared = dict(optimizer.state[params[0]])
    for p in params:
        optimizer.state[p] = shared
    with pytest.raises(KeyError, match="ax"):
        optimizer.step()


@pytest.mark.parametrize(("error", "spoil"), SPOILT.values(), ids=SPOILT)
def test_a_number_in_the_place_of_a_scalar_stays_if_the_step_is_refused(error, spoil):
    params = parameters((3,), (3,))
    optimizer = ASGD([{"params": [p]} for p in reversed(params)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[1]]["eta"] = 0.25
    spoil(optimizer, params[0])
    before = params[1].detach().clone()
    with pytest.raises(error):
        optimizer.step()
    assert type(optimizer.state[params[1]]["eta"]) is float
    same(params[1].detach(), before)
