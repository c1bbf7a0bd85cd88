"""The averages of arrays put to use: in the place of their params, or copied to other arrays."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from averaging import (
    BEGUN,
    OPTIONS,
    STEPS,
    InsideError,
    arrays_of_all_kinds,
    asks_early,
    grads_like,
    raw,
    rounded_to,
    run,
)
from torch import nn

from asgd_fast import ASGD, ArrayASGD

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("wide", [None, "float32", "float64"])
@asks_early
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
        if k + 1 >= BEGUN:
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
    message = f"^{name.strip()}: is not possible inside averaged_parameters"
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match=message):
        ARRAY_REFUSED[name](optimizer)
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
