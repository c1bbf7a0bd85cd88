"""What is said where averages are asked for that have not begun, and whether they have."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from averaging import BEGUN, OPTIONS, averages_of, step, stepped
from torch import nn
from twins import parameters, same

import asgd_fast
from asgd_fast import ASGD, ArrayASGD, AveragingNotBegunWarning

pytestmark = pytest.mark.usefixtures("seeded")


def evaluate(optimizer, _model):
    with optimizer.averaged_parameters():
        pass


ASK = {
    "averaged_parameters": evaluate,
    "copy_averages_to": lambda optimizer, model: optimizer.copy_averages_to(model),
    "averaged_state_dict": lambda optimizer, model: optimizer.averaged_state_dict(model),
}


@pytest.mark.parametrize("name", ASK)
def test_it_warns_once_where_no_average_has_begun(name):
    """Of a category of its own, at the caller's line, by t0 and the number of steps."""
    model = nn.Linear(3, 2)
    optimizer = ASGD(model.parameters())
    ASK[name](optimizer, model)  # before the first step nothing is expected
    for k in range(3):
        step(optimizer, list(model.parameters()), k)
    message = rf"^{name}: .* t0 is 1e\+06 and the number of steps is 3; .*start_averaging\(\)"
    with pytest.warns(AveragingNotBegunWarning, match=message) as caught:
        ASK[name](optimizer, model)
    assert [warning.filename for warning in caught] == [__file__]
    for ask in ASK.values():
        ask(optimizer, model)
    another = ASGD(model.parameters())
    step(another, list(model.parameters()))
    with pytest.warns(AveragingNotBegunWarning):
        ASK[name](another, model)
    assert issubclass(asgd_fast.AveragingNotBegunWarning, UserWarning)


def test_it_can_be_silenced_by_its_category():
    optimizer = stepped(parameters((3,)), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AveragingNotBegunWarning)
        evaluate(optimizer, None)


def test_as_an_error_it_changes_nothing():
    params = parameters((3,))
    optimizer = stepped(params, 1)
    for _ in range(2):
        with pytest.raises(AveragingNotBegunWarning):
            evaluate(optimizer, None)
    step(optimizer, params)  # which would be refused inside


def test_the_first_of_several_averages_is_enough():
    params = parameters((3,), (4,))
    groups = [{"params": params[:1], "t0": 50}, {"params": params[1:], "t0": 1}]
    optimizer = ASGD(groups, lr=0.3)
    step(optimizer, params)
    with pytest.warns(AveragingNotBegunWarning, match="t0 is 1 and the number of steps is 1"):
        evaluate(optimizer, None)
    other = ASGD(groups, lr=0.3)
    for k in range(3):
        step(other, params, k)
    evaluate(other, None)


@pytest.mark.parametrize("of_arrays", [False, True], ids=["torch", "arrays"])
@pytest.mark.parametrize("t0", [0, 50])
def test_an_average_that_begins_with_the_next_step_is_no_surprise(t0, of_arrays):
    params = [np.ones(3), np.ones(4)] if of_arrays else parameters((3,), (4,))
    optimizer = ArrayASGD(params, lr=0.3, t0=t0) if of_arrays else ASGD(params, lr=0.3, t0=t0)

    def one_step():
        if of_arrays:
            optimizer.step([np.ones_like(params[0]), None])
        else:
            step(optimizer, params[:1])

    one_step()
    if t0:
        optimizer.start_averaging()
    evaluate(optimizer, None)
    one_step()
    assert optimizer.is_averaging
    optimizer.start_averaging(0)
    evaluate(optimizer, None)


@pytest.mark.parametrize("call", ["averaged_parameters", "is_averaging"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_whether_averaging_has_begun(wide, lazy, call):
    params = parameters((3,), (4, 5))
    optimizer = ASGD(params, average_dtype=wide, lazy_average=lazy, **OPTIONS)
    assert optimizer.is_averaging is False
    for k in range(BEGUN + 2):
        step(optimizer, params, k)
        assert optimizer.is_averaging is (k + 1 >= BEGUN)
    if call == "averaged_parameters":
        with optimizer.averaged_parameters():
            assert optimizer.is_averaging is True
    for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert duplicate.is_averaging is True
    optimizer.start_averaging()
    assert optimizer.is_averaging is False
    step(optimizer, params[:1])
    assert optimizer.is_averaging is True


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_averages_in_the_order_of_the_groups(wide, lazy):
    """As ArrayASGD's: those that the steps update, and copies of the params before they begin."""
    params = parameters((3,), (4, 5), (6,))
    groups = [{"params": params[2:]}, {"params": params[:2]}]
    optimizer = ASGD(groups, average_dtype=wide, lazy_average=lazy, **OPTIONS)
    ordered = [params[2], *params[:2]]
    for k in range(BEGUN + 2):
        for p, ax in zip(ordered, optimizer.averages, strict=True):
            same(ax, p.detach().to(wide or p.dtype))
            assert ax.data_ptr() != p.data_ptr()
            if lazy or k == 0:
                ax.fill_(7)  # a copy
        if k + 1 >= BEGUN:
            break
        step(optimizer, params[:2], k)
        params[2].grad = None
    step(optimizer, params[:2], BEGUN)
    held = optimizer.averages
    for k in range(3):
        step(optimizer, params[:2], k)
    assert all(one is other for one, other in zip(held[1:], optimizer.averages[1:], strict=True))
    for p, ax in zip(ordered[1:], held[1:], strict=True):
        same(ax, optimizer.state[p]["ax"])
        assert not torch.equal(ax, p)
    same(held[0], params[2].detach().to(wide or torch.float32))


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_averages_inside(wide):
    params = parameters((3,), (4, 5))
    optimizer = stepped(params, average_dtype=wide)
    wanted = averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        for p, ax, value in zip(params, optimizer.averages, wanted, strict=True):
            same(ax, value)
            assert not ax.requires_grad
            assert (ax.data_ptr() == p.data_ptr()) is (wide is None)
    for ax, value in zip(optimizer.averages, wanted, strict=True):
        same(ax, value)


def test_averages_are_shown_to_autograd():
    """Who computes with them is told when a step changes them."""
    params = parameters((3,))
    optimizer = stepped(params)
    (ax,) = optimizer.averages
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * ax).sum()
    step(optimizer, params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
