"""The hyperparameters that torch lacks together: its own step, checkpoints, and values refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from averaging import asks_early
from runs import ArrayRun, runs, saved_and_loaded, with_lr
from torch import nn
from twins import bits, parameters, same

from asgd_fast import ASGD, ArrayASGD

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    ("schedule", "every", "averaging", "t0", "started"),
    list(
        product(
            *(["torch", "current"], [1, 3], ["mean", ("ema", 0.7), ("polynomial", 2)]),
            *([0, 2.5, 1e6], [None, 4]),
        )
    ),
    ids=str,
)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_goes_to_torch_has_the_bits_of_the_engine(
    dtype, wide, schedule, every, averaging, t0, started
):
    """With all keywords together, and an lr that changes."""
    data = torch.randn(5, 7, 2).to(dtype)
    dense, gappy = nn.Parameter(data[..., 0].clone()), nn.Parameter(data[..., 0])
    assert not gappy.is_contiguous()
    options = {"lambd": 0.1, "t0": t0, "weight_decay": 0.05, "maximize": True}
    options |= {"average_every": every, "averaging": averaging}
    optimizers = [
        ASGD([p], average_dtype=wide, lr_schedule=schedule, **options) for p in (dense, gappy)
    ]
    for k in range(13):
        dense.grad = torch.randn(5, 7).to(dtype)
        gappy.grad = dense.grad.clone()
        for optimizer in optimizers:
            with_lr(optimizer, 0.3 + 0.1 * (k % 3))
            if k == started:
                optimizer.start_averaging()
            optimizer.step()
        assert torch.equal(bits(dense.detach()), bits(gappy.detach()))
        ours, theirs = (o.state[p] for o, p in zip(optimizers, (dense, gappy), strict=True))
        for name in ("step", "eta", "mu"):
            assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(ours["ax"], theirs["ax"])


@pytest.mark.parametrize("source", ["ours", "torch"])
def test_checkpoints_keep_the_keywords_where_they_have_them(source):
    (p,) = parameters((3,))
    options = {"lr_schedule": "current", "average_every": 5, "averaging": ("ema", 0.5)}
    before = ASGD([p], **options) if source == "ours" else torch.optim.ASGD([p])
    p.grad = torch.ones(3)
    before.step()
    own = {} if source == "ours" else options
    after = ASGD(parameters((3,)), **own)
    after.load_state_dict(saved_and_loaded(before.state_dict()))
    assert {name: after.param_groups[0][name] for name in options} == options


@pytest.mark.parametrize("schedule", ["torch", "current"])
def test_saved_states_of_arrays_with_the_keywords(through, schedule):
    run = ArrayRun((3,), t0=1, average_every=3, lr_schedule=schedule)
    for _ in range(6):
        run.step()
    other = ArrayASGD(run.params)
    other.load_state_dict(through(run.optimizer.state_dict()))
    assert other.param_groups[0]["lr_schedule"] == schedule
    assert other.param_groups[0]["average_every"] == 3
    run.optimizer = other
    for _ in range(6):
        run.step()
        run.check(2, every=3)


REFUSED = [
    ("lr_schedule", "cosine", ValueError, "Invalid lr_schedule: 'cosine' .expected 'torch' or 'cu"),
    ("lr_schedule", None, ValueError, "Invalid lr_schedule: None"),
    ("lr_schedule", True, ValueError, "Invalid lr_schedule: True"),
    ("lr_schedule", [], ValueError, r"Invalid lr_schedule: \[\]"),
    ("average_every", 0, ValueError, "Invalid average_every: 0 .expected 1 <= average_every"),
    ("average_every", -3, ValueError, "Invalid average_every: -3"),
    ("average_every", 2.0, TypeError, "average_every: expected an integer, got 2.0 of type float"),
    ("average_every", True, TypeError, "average_every: expected an integer, got True of type bool"),
    ("average_every", "2", TypeError, "average_every: expected an integer, got '2' of type str"),
    ("average_every", None, TypeError, "average_every: expected an integer, got None"),
]


@asks_early
@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED)
@runs
def test_keywords_that_are_refused(make, name, value, error, message):
    with pytest.raises(error, match=message):
        make((3,), **{name: value})
    run = make((3,), (4,), t0=0)
    run.step()
    with pytest.raises(error, match=message):
        run.optimizer.add_param_group({"params": make((3,)).params, name: value})
    assert len(run.optimizer.param_groups) == 1
    before = [run.value(i).tolist() for i in range(2)]
    averages = [run.average(i).tolist() for i in range(2)]
    (group,) = run.optimizer.param_groups
    good = dict(group)
    group[name] = value
    with pytest.raises(error, match=message):
        run.step()
    assert [run.value(i).tolist() for i in range(2)] == before
    assert [run.average(i).tolist() for i in range(2)] == averages
    del group[name]
    group.update(good)
    run.step()


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
@pytest.mark.parametrize("own", [{"lr_schedule": "current"}, {"average_every": 2}], ids=str)
def test_keywords_that_torchs_own_step_does_not_take(option, own):
    message = "^differentiable: goes only with lr_schedule='torch', average_every=1 and averaging='"
    if option == "capturable":  # which a GPU's params may be
        message = "^capturable: .*; got one on cpu$"
    else:
        with pytest.raises(ValueError, match=message):
            ASGD(parameters((3,)), **{option: True}, **own)
    (p,) = params = parameters((3,))
    optimizer = ASGD(params, **own)
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    same(p, before)


def test_whole_numbers_of_other_types():
    for make in (lambda **o: ASGD(parameters((3,)), **o), lambda **o: ArrayASGD(np.ones(3), **o)):
        optimizer = make(average_every=np.int64(3))
        assert optimizer.param_groups[0]["average_every"] == 3


@pytest.mark.parametrize("in_group", [False, True], ids=["optimizer", "group"])
def test_checkpoints_with_scalars_of_numpy_are_plain(in_group):
    """Which torch.load(weights_only=True) takes, with all that was given."""
    own = {
        "averaging": (np.str_("ema"), np.float32(0.9)),
        "average_every": np.int64(3),
        "lr_schedule": np.str_("current"),
    }
    params = parameters((3,))
    optimizer = ASGD([{"params": params, **own}]) if in_group else ASGD(params, **own)
    (group,) = saved_and_loaded(optimizer.state_dict())["param_groups"]
    assert group["averaging"] == ("ema", float(np.float32(0.9)))
    assert group["average_every"] == 3
    assert group["lr_schedule"] == "current"


def test_an_optimizer_pickled_before_there_was_averaging_takes_groups():
    first, second = parameters((3,), (2,))
    pickled = ASGD([first], lr_schedule="current").__getstate__()
    pickled["_own_defaults"] = {"lr_schedule": "current", "average_every": 1}
    pickled["defaults"] = {k: x for k, x in pickled["defaults"].items() if k != "averaging"}
    optimizer = ASGD.__new__(ASGD)
    optimizer.__setstate__(pickled)
    optimizer.add_param_group({"params": [second]})
    assert [group["lr_schedule"] for group in optimizer.param_groups] == ["current"] * 2
    optimizer.add_param_group({"params": parameters((1,)), "averaging": ("ema", 0.5)})
    assert optimizer.param_groups[2]["averaging"] == ("ema", 0.5)
