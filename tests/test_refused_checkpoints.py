"""Checkpoints that ASGD refuses, each by the name of what is wrong, and changes nothing then."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from twins import NAMES, Twins, entries_of, parameters, same, sealed_or_open

from asgd_fast import ASGD

T0 = 4
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0, "weight_decay": 0.01}
SCALARS = ("step", "eta", "mu")

BAD_SCALARS = {
    "two numbers": (torch.tensor([0.1, 0.1]), ValueError, r"expected one number.*shape \(2,\)"),
    "no number": (torch.tensor([]), ValueError, r"expected one number.*shape \(0,\)"),
    "complex": (torch.tensor(1j), TypeError, "expected a real number, got a tensor of torch.comp"),
    "complex number": (1j, TypeError, "expected a real number, got 1j"),
    "None": (None, TypeError, "expected a real number, got None"),
    "str": ("0.1", TypeError, "expected a real number, got '0.1'"),
    "list": ([0.1], TypeError, r"expected a real number, got \[0.1\]"),
    "elsewhere": (torch.tensor(0.5, device="meta"), TypeError, "expected a dense tensor.*on meta"),
    "sparse": (torch.ones(1).to_sparse(), TypeError, "expected a dense tensor.*torch.sparse_coo"),
    "huge": (10**400, TypeError, "expected a real number, got 1000"),
}
BAD_STARTS = {
    "None": (None, TypeError, "expected a real number, got None"),
    "str": ("late", TypeError, "expected a real number, got 'late'"),
    "inf": (float("inf"), ValueError, "inf"),
    "two numbers": (torch.tensor([1.0, 2.0]), TypeError, "expected a real number"),
    "complex": (torch.tensor(1j), TypeError, "expected a real number"),
    "elsewhere": (torch.tensor(1.0, device="meta"), TypeError, "expected a real number"),
}
BAD_AVERAGES = {
    "shape": (torch.zeros(5), ValueError, r"shape \(5,\) does not match its param of shape \(3,\)"),
    "None": (None, TypeError, "expected a tensor, got NoneType"),
    "list": ([0.0] * 3, TypeError, "expected a tensor, got list"),
    "number": (0.5, TypeError, "expected a tensor, got float"),
    "elsewhere": (torch.zeros(3, device="meta"), TypeError, "expected a dense tensor.*on meta"),
    "sparse": (torch.zeros(3).to_sparse(), TypeError, "expected a dense tensor.*torch.sparse_coo"),
}
BAD_HYPERPARAMETERS = {
    "lr": ("0.1", TypeError, "lr: expected a real number, got '0.1'"),
    "lr of two": (torch.tensor([0.1, 0.1]), ValueError, r"lr: expected one number"),
    "lambd": (-1.0, ValueError, "Invalid lambd value: -1.0"),
    "alpha": (None, TypeError, "alpha: expected a real number, got None"),
    "t0": (float("nan"), ValueError, "Invalid t0 value: nan"),
    "weight_decay": ("much", TypeError, "weight_decay: expected a real number, got 'much'"),
    "lr_schedule": ("cosine", ValueError, "Invalid lr_schedule: 'cosine'"),
    "average_every": (0, ValueError, "Invalid average_every: 0"),
    "averaging": (["ema", 2], ValueError, "Invalid averaging decay: 2"),
    **{
        name: (torch.tensor([0.0, 1.0]), TypeError, f"{name}: expected a bool, got tensor")
        for name in ("foreach", "maximize", "differentiable", "capturable")
    },
}


def put(name, value):
    def spoil(saved):
        saved["state"][1][name] = value

    return spoil


def put_in_group(name, value):
    def spoil(saved):
        saved["param_groups"][1][name.split()[0]] = value

    return spoil


def without(name):
    def spoil(saved):
        del saved["state"][1][name]

    return spoil


def without_in_group(name):
    def spoil(saved):
        del saved["param_groups"][1][name]

    return spoil


def in_place_of_the_entry(saved):
    saved["state"][1] = [1.0, 2.0]


SPOILT = {
    **{
        f"{name} {kind}": (put(name, value), error, rf"state\[1\]\['{name}'\]: .*{message}")
        for name, bad in (
            *((name, BAD_SCALARS) for name in SCALARS),
            ("t0", BAD_STARTS),
            ("ax", BAD_AVERAGES),
        )
        for kind, (value, error, message) in bad.items()
    },
    **{
        f"{name} missing": (without(name), KeyError, rf"state\[1\]: missing \['{name}'\]")
        for name in SCALARS
    },
    **{
        f"group's {name}": (put_in_group(name, value), error, rf"^param_groups\[1\]: {message}")
        for name, (value, error, message) in BAD_HYPERPARAMETERS.items()
    },
    **{
        f"group's {name} missing": (
            without_in_group(name),
            KeyError,
            rf"param_groups\[1\]: missing \['{name}'\]",
        )
        for name in ("lr", "lambd", "alpha", "t0", "weight_decay")
    },
    "a list": (in_place_of_the_entry, TypeError, r"^state\[1\]: expected a dict, got list"),
    "no state": (lambda saved: saved.pop("state"), KeyError, "state"),
    "no groups": (lambda saved: saved.pop("param_groups"), KeyError, "param_groups"),
}


@sealed_or_open
@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=SPOILT)
def test_what_is_refused_is_named_and_changes_nothing(spoil, error, message, looks):
    def groups(own):
        return [{"params": own[:1]}, {"params": own[1:]}]

    twins = Twins(parameters((3,), (3,)), groups, looks=looks, **OPTIONS)
    twins.run(T0 + 4)
    saved = copy.deepcopy(twins.ours.state_dict())
    for entry in saved["state"].values():
        entry["mu"] = torch.tensor(0.75)
    spoil(saved)
    state, param_groups = twins.ours.state, twins.ours.param_groups
    with pytest.raises(error, match=message):
        twins.ours.load_state_dict(saved)
    assert twins.ours.state is state
    assert twins.ours.param_groups is param_groups
    twins.run(3)


TAKEN = {
    "of one element": lambda x: x.reshape(1),
    "double": lambda x: x.double(),
    "int": lambda x: x.long() if x == x.long() else x,
}


@pytest.mark.parametrize("kind", [np.float32, np.float64, lambda x: np.array([x])])
def test_numbers_of_numpy_are_taken(kind):
    params = parameters((3,), (4,))
    optimizer = ASGD(params, **OPTIONS)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry.update({name: kind(float(entry[name])) for name in SCALARS})
    other = ASGD(params)
    other.load_state_dict(saved)
    for p in params:
        for name in SCALARS:
            same(other.state[p][name], optimizer.state[p][name])


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
def test_scalars_that_torch_takes_are_taken(change, name):
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(3)
    for optimizer in (twins.ours, twins.theirs):
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry[name] = change(entry[name])
        optimizer.load_state_dict(saved)
    for _ in range(T0 + 3):
        twins.step()
    for p, q in zip(twins.params, twins.theirs_params, strict=True):
        same(p, q)
        ours, theirs = (entries_of(o)[x] for o, x in ((twins.ours, p), (twins.theirs, q)))
        for name in NAMES:
            assert float(ours[name].sum()) == float(theirs[name].sum())


@pytest.mark.parametrize("kind", [np.float32, np.float64, lambda x: np.array([x])])
def test_scalars_of_numpy_are_the_numbers_that_they_hold(kind):
    p, q = parameters((3,), (3,))
    optimizer, other = ASGD([p], t0=0), ASGD([q], t0=0)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    entry = saved["state"][0]
    entry.update({name: kind(entry[name].item()) for name in SCALARS})
    other.load_state_dict(saved)
    q.grad = torch.ones(3)
    for each in (optimizer, other):
        each.step()
    for name in SCALARS:
        assert torch.equal(optimizer.state[p][name], other.state[q][name])


@pytest.mark.parametrize("step", [2**63 - 1, 2**63, 2**100, 1e30])
@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["number", "tensor"])
def test_large_steps_are_saved_as_what_they_are(kind, step):
    if kind is torch.tensor and isinstance(step, int) and step >= 2**63:
        step = float(step)
    p, q = parameters((3,), (3,))
    optimizer, other = ASGD([p]), ASGD([q])
    p.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = kind(step)
    other.load_state_dict(saved)
    assert other.state_dict()["state"][0]["step"] == float(step)
    q.grad = torch.ones(3)
    other.step()
    assert other.state_dict()["state"][0]["step"] == float(step)


def test_a_param_that_is_nowhere_loads_as_in_torch():
    """A model on the meta device, whose state is there too."""
    results = []
    for make in (ASGD, torch.optim.ASGD):
        (p,) = parameters((3,))
        source = make([p], **OPTIONS)
        p.grad = torch.ones(3)
        source.step()
        q = nn.Parameter(torch.empty(3, device="meta"))
        target = make([q], foreach=False)
        target.load_state_dict(source.state_dict())
        results.append([target.state[q][name].device.type for name in ("eta", "mu", "ax")])
    assert results[0] == results[1]


@sealed_or_open
def test_a_checkpoint_holds_plain_dicts_alone(looks):
    """PyTrees know no others."""
    twins = Twins(parameters((3,), (4,)), looks=looks, **OPTIONS)
    twins.run(3)
    twins.ours.start_averaging()
    for optimizer in (twins.ours, copy.deepcopy(twins.ours), copy.copy(twins.ours)):
        for saved in (optimizer.state_dict(), torch.optim.Optimizer.state_dict(optimizer)):
            assert not any(isinstance(leaf, dict) for leaf in tree_leaves(saved))
    assert type(twins.ours.state[twins.params[0]].copy()) is dict


def old_checkpoint(**group):
    """What `start_averaging` once wrote: params of 4 and 2 steps, and one that made none."""
    ax = torch.zeros(3, dtype=torch.float64)

    def entry(step, **more):
        scalars = {"step": torch.tensor(step), "eta": torch.tensor(0.1), "mu": torch.tensor(1.0)}
        return {**scalars, "ax": ax.clone(), **more}

    return {
        "state": {0: entry(4.0), 1: entry(2.0, t0=1.0)},
        "param_groups": [
            {
                "lr": 0.1,
                "lambd": 1e-4,
                "alpha": 0.75,
                "t0": 3.0,
                "weight_decay": 0,
                "foreach": None,
                "maximize": False,
                "differentiable": False,
                "capturable": False,
                "lr_schedule": "torch",
                "average_every": 1,
                "averaging_started": True,
                "params": [0, 1, 2],
                **group,
            }
        ],
    }


def means_from(optimizer, params, firsts):
    """Step on; assert that averages are the means of the iterates from the first ones on."""
    made = [[] for _ in params]
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p, iterates in zip(params, made, strict=True):
            iterates.append(p.detach().clone())
    for p, iterates, first in zip(params, made, firsts, strict=True):
        mean = torch.stack(iterates[first:]).mean(dim=0)
        # mu is float32
        torch.testing.assert_close(optimizer.state[p]["ax"], mean, rtol=1e-6, atol=1e-6)


def test_checkpoints_that_name_started_averages_are_taken():
    params = parameters((3,), (3,), (3,), dtype=torch.float64)
    optimizer = ASGD(params)
    optimizer.load_state_dict(old_checkpoint())
    means_from(optimizer, params, [0, 0, 0])
    assert optimizer.param_groups[0].keys() == torch.optim.ASGD(params).param_groups[0].keys()


def test_checkpoints_without_averages_that_have_not_begun_are_taken():
    params = parameters((3,), (3,), (3,), dtype=torch.float64)
    saved = old_checkpoint()
    for entry in saved["state"].values():
        del entry["ax"]
    optimizer = ASGD(params)
    optimizer.load_state_dict(saved)
    means_from(optimizer, params, [0, 0, 0])


def test_own_hyperparameters_in_checkpoints_are_taken():
    params = parameters((3,), (3,), (3,), dtype=torch.float64)
    optimizer = ASGD(params, average_every=7)
    optimizer.load_state_dict(old_checkpoint(lr_schedule="current"))
    assert optimizer.param_groups[0]["lr_schedule"] == "current"
    means_from(optimizer, params, [0, 0, 0])  # so each iterate is averaged


def test_an_optimizer_pickled_with_started_averages_goes_on():
    params = parameters((3,), (3,), (3,), dtype=torch.float64)
    saved = old_checkpoint(params=params)
    optimizer = ASGD.__new__(ASGD)
    optimizer.__setstate__(
        {
            "defaults": ASGD(params).defaults,
            "state": {params[i]: entry for i, entry in saved["state"].items()},
            "param_groups": saved["param_groups"],
            "lazy_average": True,
            "average_dtype": None,
            "_own_defaults": {"lr_schedule": "torch", "average_every": 1},
            "_scalars_on_device": False,
        }
    )
    means_from(optimizer, params, [0, 0, 0])


def test_a_t0_that_was_put_into_an_entry_stays_there():
    """It cannot be told from the scalars."""
    (p,) = parameters((3,))
    optimizer = ASGD([p], **OPTIONS)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["t0"] = 2.5
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["t0"] == 2.5
    assert saved["param_groups"][0]["t0"] == T0
    other = ASGD([p])
    other.load_state_dict(saved)
    assert other.state[p]["t0"] == 2.5


@pytest.mark.parametrize("t0", [2.5, 2.0**47, 2.0**53])
def test_where_averages_begin_is_kept_when_the_t0_of_the_group_cannot_show_it(t0):
    """As it is no whole number, or so large that its last bits are no fractions."""
    params = parameters((3,), (3,), dtype=torch.float64)
    optimizer = ASGD(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.start_averaging()
    optimizer.param_groups[0]["t0"] = t0
    other = ASGD(params)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["t0"] == t0
    iterates = []
    for _ in range(4):
        params[1].grad = torch.randn_like(params[1])
        other.step()
        iterates.append(params[1].detach().clone())
    mean = torch.stack(iterates).mean(dim=0)
    torch.testing.assert_close(other.state[params[1]]["ax"], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:load_state_dict. mu is 0.3")  # as of other settings
@pytest.mark.parametrize("mu", [0.3, 1.5, -1.0, float("nan")])
def test_a_mu_that_was_put_in_survives_a_started_average(mu):
    p, q = params = parameters((3,), (3,))
    optimizer = ASGD(params, **OPTIONS)
    for x in (p, q, p):
        p.grad = q.grad = None
        x.grad = torch.ones(3)
        optimizer.step()
    optimizer.start_averaging()
    optimizer.state[q]["mu"].fill_(mu)
    other = ASGD(params)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in params:
        for name in SCALARS:
            same(other.state[x][name], optimizer.state[x][name])
    assert [other.state[x].get("t0") for x in params] == [None, 0.0]
    assert other.param_groups[0]["t0"] == optimizer.param_groups[0]["t0"] == 1
