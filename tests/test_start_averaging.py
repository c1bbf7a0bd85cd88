"""start_averaging(): the next iterate is the first one in the average, whenever it is called."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from runs import OPTIONS, WAYS, ArrayRun, TorchRun, lazy_or_eager, runs
from torch import nn
from twins import Twins, parameters

from asgd_fast import ASGD, ArrayASGD

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("call", ["start_averaging", "reset_averages"])
@pytest.mark.parametrize("t0", [1e6, 0, 2.5])
@pytest.mark.parametrize("before", [0, 1, 2, 5])
@lazy_or_eager
@runs
def test_the_next_iterate_is_the_first_one(double_scalars, make, lazy, before, t0, call):
    """Whether averaging has begun already or not; and again whenever it is called."""
    run = make((3, 4), (5,), t0=t0, lazy_average=lazy)
    for _ in range(before):
        run.step()
    for first in (before, before + 6, before + 7):
        getattr(run.optimizer, call)()
        if before and not (make is TorchRun and not lazy):
            np.testing.assert_array_equal(run.average(0), run.value(0))  # the old one is given up
        for _ in range(1 if first == before + 6 else 6):
            run.step()
            run.check(first, first)
    mean = np.mean(run.iterates[0][before:], axis=0)
    assert np.abs(run.average(0) - mean).max() > 1e-3  # which the last call made forgotten


@runs
def test_called_twice_before_a_step(double_scalars, make):
    run = make((3,), (4,))
    run.step()
    run.optimizer.start_averaging()
    run.optimizer.reset_averages()
    run.optimizer.start_averaging(0)
    for _ in range(4):
        run.step()
        run.check(1, 1)


@runs
def test_one_group_of_several(double_scalars, make):
    run = make((3,), (4,), (5,), groups=lambda own: [{"params": [p]} for p in own])
    run.step()
    run.optimizer.start_averaging(group=1)
    run.step()
    run.step()
    run.check(None, 1)
    for i in (0, 2):  # whose averages have not begun
        np.testing.assert_array_equal(run.average(i), run.value(i))
    run.optimizer.start_averaging(-1)
    for _ in range(3):
        run.step()
        run.check(None, 1, 3)
    run.optimizer.reset_averages(1)
    for _ in range(3):
        run.step()
        run.check(None, 6, 3)
    np.testing.assert_array_equal(run.average(0), run.value(0))


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (3, IndexError, "^group: got 3 for 3 groups; expected -3 <= group < 3$"),
        (-4, IndexError, "^group: got -4 for 3 groups; expected"),
        ("0", TypeError, "^group: expected an integer, got '0' of type str$"),
        (slice(0, 1), TypeError, "^group: expected an integer, got slice"),
        (1.0, TypeError, "^group: expected an integer, got 1.0 of type float$"),
    ],
)
@pytest.mark.parametrize("call", ["start_averaging", "reset_averages"])
@runs
def test_a_group_that_is_not_there(double_scalars, make, call, group, error, message):
    run = make((3,), (4,), (5,), groups=lambda own: [{"params": [p]} for p in own], t0=0)
    for _ in range(4):
        run.step()
    with pytest.raises(error, match=message):
        getattr(run.optimizer, call)(group)
    run.step()
    run.check(1, 1, 1)


@lazy_or_eager
@runs
def test_params_of_other_step_counts_begin_each_with_its_next(double_scalars, make, lazy):
    """Those that had no gradient yet, with their first iterate of all."""
    run = make((3,), (4,), (5,), (6,), lazy_average=lazy)
    for k in range(6):
        run.step(*([2, 3] if k % 2 else [1, 2, 3]))
    run.optimizer.start_averaging()
    run.step(1, 2)  # the last one joins
    run.check(6)
    for _ in range(3):
        run.step(2)
        run.check(6, 3, None, 0)
    for _ in range(3):
        run.step()
        run.check(6, 3, 0, 0)
    run.optimizer.start_averaging()
    run.step(3)
    run.step()
    run.check(13, 9, 3, 7)


def test_where_torch_params_of_other_step_counts_keep_their_t0():
    run = TorchRun((3,), (4,), (5,))
    run.step()
    run.step(1, 2)
    run.step(1, 2)
    run.optimizer.start_averaging()
    state = run.optimizer.state
    assert run.optimizer.param_groups[0]["t0"] == 2
    assert ["t0" in state[p] for p in run.params] == [False, True, True]
    assert [state[p]["t0"] for p in run.params[1:]] == [0, 0]
    for _ in range(2):
        run.step(0)
    run.optimizer.start_averaging()  # all are at the same step now
    assert not any("t0" in state[p] for p in run.params)


@lazy_or_eager
@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_bits_of_torch_with_such_a_t0(dtype, before, lazy):
    """And again in the midst of averaging, where torch's own state is set by hand."""
    params = parameters((3,), (40, 5), dtype=dtype)
    twins = Twins(params, weight_decay=0.1, lazy_average=lazy, **OPTIONS)
    twins.run(before)
    for first in (before, before + 6):
        twins.ours.start_averaging()
        twins.theirs.param_groups[0]["t0"] = first - 1
        for entry in twins.theirs.state.values():
            entry["mu"].fill_(1)
        twins.run(6)


def test_inside_a_group_that_follows_lr_at_once(double_scalars):
    """The first step after the start is the first one whose eta decays."""
    run = TorchRun((3,), lr_schedule="current", lr=0.5, lambd=0.25, alpha=1.0)
    (p,) = run.params
    for k in range(6):
        if k == 3:
            run.optimizer.start_averaging()
        before, p.grad = run.value(0), torch.ones_like(p)
        run.optimizer.step()
        eta = 0.5 if k < 3 else 0.5 / (1 + 0.25 * 0.5 * (k - 2))
        decay = 1.0 if k < 3 else 1 - 0.25 * eta
        np.testing.assert_allclose(run.value(0), before * decay - eta, rtol=1e-14)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps_after", [0, 1, 2, 5])
@pytest.mark.parametrize("target", [ASGD, torch.optim.ASGD], ids=["ours", "torch"])
def test_checkpoints_after_the_start(double_scalars, target, steps_after, way):
    """Go on with the right weights in torch, too, where all params are at the same step."""
    run = TorchRun((3,), (4, 5), (2,))
    for _ in range(4):
        run.step()
    run.optimizer.start_averaging()
    for _ in range(steps_after):
        run.step()
    other = target(run.params, lr=9.0)
    other.load_state_dict(way(run.optimizer.state_dict()))
    run.optimizer = other
    for _ in range(4):
        run.step()
        run.check(4, 4, 4)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps_after", [0, 1, 2, 5])
def test_checkpoints_of_params_of_other_step_counts(double_scalars, steps_after, way):
    run = TorchRun((3,), (4, 5), (2,))
    for k in range(4):
        run.step(*([2] if k % 2 else [1, 2]))
    run.optimizer.start_averaging()
    for _ in range(steps_after):
        run.step(2)
    other = ASGD(run.params, lr=9.0)
    other.load_state_dict(way(run.optimizer.state_dict()))
    run.optimizer = other
    for _ in range(4):
        run.step()  # the last one joins after the checkpoint
        run.check(4, 2, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps_after", [0, 1, 3])
@runs
def test_copies_of_the_optimizer_after_the_start(double_scalars, make, steps_after, duplicate):
    run = make((3,), (4, 5), (2,))
    for k in range(4):
        run.step(*([2] if k % 2 else [1, 2]))
    run.optimizer.start_averaging()
    for _ in range(steps_after):
        run.step(2)
    run.optimizer = duplicate(run.optimizer)
    run.params = run.optimizer.param_groups[0]["params"]
    for _ in range(4):
        run.step()
        run.check(4, 2, 0)


@pytest.mark.parametrize("steps_after", [0, 1, 4])
def test_saved_states_of_arrays_after_the_start(through, steps_after):
    run = ArrayRun((3,), (4, 5), (2,), groups=lambda own: [{"params": own[:2]}, {"params": own[2]}])
    for k in range(4):
        run.step(*([2] if k % 2 else [1, 2]))
    run.optimizer.start_averaging(0)
    for _ in range(steps_after):
        run.step(2)
    state = run.optimizer.state_dict()
    assert state["start"].tolist() == [3, 1, 1e6]
    other = ArrayASGD([{"params": run.params[:2]}, {"params": run.params[2]}], lr=9.0)
    other.load_state_dict(through(state))
    run.optimizer = other
    for _ in range(4):
        run.step()
        run.check(4, 2)
    np.testing.assert_array_equal(run.average(2), run.value(2))


def test_a_checkpoint_of_before_forgets_the_start(double_scalars):
    run = TorchRun((3,), (4,))
    run.step(1)
    before = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.start_averaging()
    run.step()
    run.optimizer.load_state_dict(before)
    assert run.optimizer.param_groups[0]["t0"] == 1e6
    for _ in range(4):
        run.step()
    for i in range(2):
        np.testing.assert_array_equal(run.average(i), run.value(i))


def test_an_average_of_a_dtype_of_its_own_keeps_it_when_it_starts_anew():
    """It was made before the model changed its dtype; torch keeps it too."""
    (p,) = parameters((3,), dtype=torch.float64)
    optimizer = ASGD([p], lr=0.1, lambd=0.0, t0=0)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.step()
    p.data = p.data.float()
    optimizer.start_averaging()
    iterates = []
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        iterates.append(p.detach().double())
    ax = optimizer.state[p]["ax"]
    assert ax.dtype == torch.float64
    torch.testing.assert_close(ax, torch.stack(iterates).mean(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("first", ["replaced", "started"])
def test_a_param_that_gets_other_memory_around_the_start(first, wide):
    """Its average leaves the memory that the param had, which may be the user's, alone."""
    data = torch.randn(3)
    p = nn.Parameter(data)
    optimizer = ASGD([p], lr=0.1, lambd=0.0, average_dtype=wide)
    p.grad = torch.randn_like(p)
    optimizer.step()
    if first == "started":
        optimizer.start_averaging()
    before = data.clone()
    p.data = data.clone()
    if first == "replaced":
        optimizer.start_averaging()
    iterates = []
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        iterates.append(p.detach().double())
    assert torch.equal(data, before)
    ax = optimizer.state[p]["ax"]
    assert ax.dtype == (wide or p.dtype)
    torch.testing.assert_close(ax.double(), torch.stack(iterates).mean(dim=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moved", ["inside", "afterwards"])
def test_an_average_given_up_after_an_evaluation_answers_its_param(moved):
    """Wherever that has moved, inside averaged_parameters() or later."""
    run = TorchRun((3,), t0=0)
    (p,) = run.params
    for _ in range(4):
        run.step()
    with run.optimizer.averaged_parameters():
        if moved == "inside":
            p.data = p.detach().clone()
    if moved == "afterwards":
        p.data = torch.randn_like(p)
    run.optimizer.start_averaging()
    for _ in range(2):
        assert torch.equal(run.optimizer.state[p]["ax"], p)
        p.data = torch.randn_like(p)
    assert "ax" not in run.optimizer.state[p]
