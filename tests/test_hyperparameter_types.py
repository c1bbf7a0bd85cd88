"""Hyperparameters of other types than float: the last bits of torch, which computes in them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.asgd import asgd as torch_asgd
from twins import Twins, entries_of, parameters, same

from asgd_fast import ASGD

pytestmark = pytest.mark.usefixtures("seeded")

TYPES = {
    "int": int,
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.float16": np.float16,
    "np.int64": np.int64,
    "0-d array": lambda x: np.array(x, "f4"),
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "bfloat16 tensor": lambda x: torch.tensor(x, dtype=torch.bfloat16),
}
VALUES = {"lr": 0.3, "lambd": 0.07, "alpha": 0.7, "t0": 2.3}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    """Of the scalars, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("make", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_of_another_type(name, make, dtype, default_dtype):
    value = 1 if make in (int, np.int64) else VALUES[name]
    options = {**VALUES, name: make(value)}
    params = parameters((3,), (1,), (4, 2), dtype=dtype)
    Twins(params, weight_decay=0.05, **options).run(9)


@pytest.mark.parametrize("make", TYPES.values(), ids=TYPES)
def test_all_of_another_type(make):
    whole = make in (int, np.int64)
    options = {name: make(1 if whole else value) for name, value in VALUES.items()}
    Twins(parameters((3,), (4, 2)), **options).run(9)


@pytest.mark.parametrize("name", ["lambd", "alpha", "t0"])
def test_a_type_that_changes_between_steps(name):
    twins = Twins(parameters((3,), (4, 2)), **VALUES)
    for make in (float, np.float32, torch.tensor, float):
        for optimizer, _ in twins.sides:
            optimizer.param_groups[0][name] = make(VALUES[name])
        twins.run(3)


def test_params_with_different_counts_of_steps():
    twins = Twins(parameters(*[(3,)] * 6), **{**VALUES, "lr": np.float32(0.3)})
    twins.run(12, skip=lambda k, i: k % (i + 1) != 0)


def test_states_of_double_scalars_under_a_default_dtype_of_single():
    for lr in (0.3, np.float64(0.3), np.float32(0.3), torch.tensor(0.3)):
        torch.set_default_dtype(torch.float64)
        try:
            twins = Twins(parameters((3,)), **{**VALUES, "lr": lr})
            twins.run(2)
        finally:
            torch.set_default_dtype(torch.float32)
        twins.run(4)


def test_an_array_of_one_number_as_lr():
    """torch keeps eta in the array's shape, and refuses one that comes later; ours has none."""
    twins = Twins(parameters((3,), (4, 2)), **{**VALUES, "lr": np.array([0.2])})
    for k in range(9):
        for optimizer, _ in twins.sides:
            optimizer.param_groups[0]["lr"] = np.array([0.2 + 0.1 * (k % 3)])
        twins.step()
        ours, theirs = (entries_of(optimizer) for optimizer, _ in twins.sides)
        for p, q in zip(twins.params, twins.theirs_params, strict=True):
            same(p, q)
            for name in ("step", "mu", "ax"):
                same(ours[p][name], theirs[q][name])
            assert ours[p]["eta"] == theirs[q]["eta"]


@pytest.mark.parametrize("every", [1, 3])
def test_what_goes_to_torch_has_the_bits_of_the_engine(every):
    """With options that torch does not have, for which its function is called param by param."""
    data = torch.randn(5, 7, 2)
    dense, gappy = nn.Parameter(data[..., 0].clone()), nn.Parameter(data[..., 0])
    options = {name: np.float32(value) for name, value in VALUES.items()}
    options |= {"average_dtype": "float64", "average_every": every}
    optimizers = [ASGD([p], **options) for p in (dense, gappy)]
    for _ in range(9):
        dense.grad = torch.randn(5, 7)
        gappy.grad = dense.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(dense, gappy)
        one, other = (o.state[p] for o, p in zip(optimizers, (dense, gappy), strict=True))
        assert one.keys() == other.keys() or one["mu"] == 1
        assert all(torch.equal(one[name], other[name]) for name in ("step", "eta", "mu", "ax"))


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=st.floats(1e-8, 1e6),
    lambd=st.just(1e-4) | st.floats(0, 1e3),
    alpha=st.sampled_from([0.0, 0.5, 0.75, 1.0, 2.0, 3.0]) | st.floats(0, 5),
    step=st.integers(0, 10**7),
)
def test_eta_of_a_tensor(dtype, lr, lambd, alpha, step):
    """Of any value, against torch's own function."""
    lr = torch.tensor(lr, dtype=dtype)
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (step, 0.0, 1.0)]
    (p,) = parameters((1,), dtype=torch.float64)
    p.grad = torch.zeros_like(p)
    optimizer = ASGD([p], lr=lr, lambd=lambd, alpha=alpha, lazy_average=False)
    names = ("step", "eta", "mu")
    optimizer.state[p] = {name: x.clone() for name, x in zip(names, scalars, strict=True)}
    optimizer.state[p]["ax"] = torch.zeros_like(p)
    optimizer.step()
    count, eta, mu = scalars
    options = {"lambd": lambd, "lr": lr, "alpha": alpha, "t0": 1e6, "weight_decay": 0.0}
    torch_asgd(
        *([p.detach().clone()], [p.grad], [torch.zeros_like(p)], [mu], [eta], [count]),
        foreach=False,
        maximize=False,
        **options,
    )
    same(optimizer.state[p]["eta"], eta)


# The keywords of the optimizer as a whole


@pytest.mark.parametrize("name", ["float32", "float64", "torch.float32", "torch.float64"])
def test_average_dtype_by_its_name(name):
    optimizer = ASGD(parameters((3,)), average_dtype=name)
    assert optimizer.average_dtype is getattr(torch, name.removeprefix("torch."))
    optimizer.average_dtype = None
    optimizer.average_dtype = name
    assert optimizer.average_dtype is getattr(torch, name.removeprefix("torch."))


@pytest.mark.parametrize("name", ["float16", "double", "", "torch.torch.float32", "bfloat16"])
def test_names_of_other_dtypes(name):
    message = "expected None, torch.float32 or torch.float64"
    with pytest.raises(ValueError, match=f"Invalid average_dtype: {name} .{message}"):
        ASGD(parameters((3,)), average_dtype=name)
    optimizer = ASGD(parameters((3,)))
    with pytest.raises(ValueError, match=f"Invalid average_dtype: {name} .{message}"):
        optimizer.average_dtype = name
    assert optimizer.average_dtype is None


KEYWORDS = {"average_dtype": torch.float64, "lazy_average": False, "fused_amp": True}


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_of_the_optimizer_is_refused_in_a_group(name):
    group = {"params": parameters((3,)), name: KEYWORDS[name]}
    message = f"^{name}: is set for the optimizer as a whole, not for a group$"
    with pytest.raises(TypeError, match=message):
        ASGD([group])
    optimizer = ASGD(parameters((4,)))
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_the_keywords_are_in_the_repr():
    lines = repr(ASGD(parameters((3,)), **KEYWORDS)).splitlines()
    assert {f"{name}: {value}" for name, value in KEYWORDS.items()} <= set(lines)


def test_nothing_is_warned_of():
    for lr in (np.float32(0.1), np.array([0.1]), torch.tensor(0.1, requires_grad=True)):
        (p,) = parameters((3,))
        optimizer = ASGD([p], lr=lr)
        p.grad = torch.ones(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            optimizer.step()
