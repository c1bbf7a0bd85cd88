"""The bits of torch.optim.ASGD(foreach=False) on the CPU, and of exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from averaging import asks_early
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Reference, exact_step

from asgd_fast import ArrayASGD, asgd_

STEPS = 310
SIZES = (0, 1, 7, 16, 33, 1000)
MORE_SIZES = [
    pytest.param(n, marks=pytest.mark.heavy) for n in (17, 31, 32, 63, 64, 65, 127, 100_003)
]
DTYPES = [pytest.param(np.float32, id="float32"), pytest.param(np.float64, id="float64")]


def shifted(rng, n, dtype, shift):
    """Random numbers at an address that is `shift` elements past an aligned one."""
    base = np.zeros(n + 64, dtype)
    shift += (-base.ctypes.data // base.itemsize) % (64 // base.itemsize)
    view = base[shift : shift + n]
    view[:] = rng.standard_normal(n)
    return view


def equal(array, tensor):
    return np.array_equal(array, tensor.detach().numpy(), equal_nan=True)


@asks_early
@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("t0", [0, 2.5, 1e6])
@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
@pytest.mark.parametrize(("lr", "lambd"), list(product([0.1, 1.0], [0.0, 1e-4, 1e-2])))
def test_array_asgd_has_the_bits_of_torch(
    dtype, lr, lambd, alpha, t0, weight_decay, maximize, double_scalars
):
    rng = np.random.default_rng(0)
    options = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
    params = [shifted(rng, n, dtype, k) for k, n in enumerate(SIZES)]
    tensors = [torch.tensor(param, requires_grad=True) for param in params]
    ours = ArrayASGD(params, **options, maximize=maximize)
    theirs = torch.optim.ASGD(tensors, **options, maximize=maximize, foreach=False)
    for _ in range(STEPS):
        grads = [shifted(rng, n, dtype, k + 1) for k, n in enumerate(SIZES)]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        ours.step(grads)
        theirs.step()
    for param, ax, tensor in zip(params, ours.averages, tensors, strict=True):
        assert equal(param, tensor)
        assert equal(ax, theirs.state[tensor]["ax"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("n", [*SIZES, *MORE_SIZES])
def test_each_simd_level_has_the_bits_of_torch_at_every_step(simd_level, dtype, weight_decay, n):
    """With torch's own eta and mu, which it keeps in float32 by default."""
    rng = np.random.default_rng(n)
    steps = 30 if n > 1000 else STEPS
    param, ax = shifted(rng, n, dtype, 1), shifted(rng, n, dtype, 3)
    alone = param.copy()
    tensor = torch.tensor(param, requires_grad=True)
    torch_asgd = torch.optim.ASGD(
        [tensor], lr=0.3, lambd=1e-3, t0=10, weight_decay=weight_decay, foreach=False
    )
    eta, mu = float(torch.tensor(0.3)), 1.0
    for _ in range(steps):
        grad = shifted(rng, n, dtype, 2)
        tensor.grad = torch.tensor(grad)
        torch_asgd.step()
        asgd_(param, grad, ax, eta=eta, mu=mu, lambd=1e-3, weight_decay=weight_decay)
        asgd_(alone, grad, eta=eta, mu=mu, lambd=1e-3, weight_decay=weight_decay)
        state = torch_asgd.state[tensor]
        eta, mu = float(state["eta"]), float(state["mu"])
        assert equal(param, tensor)
        assert equal(alone, tensor)
        assert equal(ax, state["ax"])


@asks_early
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_listing_over_a_whole_run(dtype):
    rng = np.random.default_rng(1)
    param = rng.standard_normal((5, 7)).astype(dtype)
    options = {"lr": 0.2, "lambd": 1e-2, "alpha": 0.75, "t0": 50, "weight_decay": 0.01}
    reference = Reference(torch.tensor(param), **options)
    optimizer = ArrayASGD(param, **options)
    for _ in range(STEPS):
        grad = rng.standard_normal((5, 7)).astype(dtype)
        reference.step(torch.tensor(grad))
        optimizer.step(grad)
        assert equal(param, reference.param)
        assert equal(optimizer.averages[0], reference.ax)


@pytest.mark.parametrize("dtype", DTYPES)
# 1e-50 is 0 in float32, and yet a weight decay: 0 * inf is nan.
@pytest.mark.parametrize("weight_decay", [0.0, 1e-50, 0.5])
@pytest.mark.parametrize("mu", [1.0, 0.25])
def test_special_values_flow_as_in_torch(simd_level, dtype, weight_decay, mu):
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, np.finfo(dtype).max])
    param, grad, ax = (
        grid.ravel().astype(dtype) for grid in np.meshgrid(special, special, special)
    )
    reference = Reference(torch.tensor(param), lr=0.5, lambd=0.5, weight_decay=weight_decay)
    reference.ax, reference.mu = torch.tensor(ax), mu
    reference.step(torch.tensor(grad))
    asgd_(param, grad, ax, eta=0.5, mu=mu, lambd=0.5, weight_decay=weight_decay)
    for ours, theirs in ((param, reference.param), (ax, reference.ax)):
        number = ~np.isnan(ours)
        assert equal(ours, theirs)
        assert np.array_equal(np.signbit(ours[number]), np.signbit(theirs.numpy()[number]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("eta", "lambd", "weight_decay", "mu"),
    [
        (0.1, 1e-4, 0.0, 0.5),
        (3.0, 1.0, 0.1, 1 - 2.0**-53),
        (1e-30, 0.0, 1e-10, 1 - 1e-9),
        (1e30, 1e5, 1e30, 1e-20),
    ],
)
def test_any_bit_pattern_is_treated_as_in_torch(simd_level, dtype, eta, lambd, weight_decay, mu):
    """Subnormal and huge numbers, infinities and nans, with scalars as unlikely."""
    unsigned = {np.float32: np.uint32, np.float64: np.uint64}[dtype]
    rng = np.random.default_rng(3)
    largest = np.iinfo(unsigned).max
    param, grad, ax = rng.integers(largest, size=(3, 20_000), dtype=unsigned).view(dtype)
    reference = Reference(torch.tensor(param), lambd=lambd, weight_decay=weight_decay)
    reference.ax, reference.eta, reference.mu = torch.tensor(ax), eta, mu
    reference.step(torch.tensor(grad))
    asgd_(param, grad, ax, eta=eta, mu=mu, lambd=lambd, weight_decay=weight_decay)
    assert equal(param, reference.param)
    assert equal(ax, reference.ax)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_each_line_of_the_contract_rounds_once(dtype, data):
    width = np.finfo(dtype).bits
    # Normal numbers whose products stay normal: the oracle's rounding knows no others.
    number = st.floats(2.0**-15, 2.0**15, width=width).flatmap(
        lambda x: st.sampled_from([x, -x])
    ) | st.just(0.0)
    positive = st.floats(2.0**-10, 2.0**5)
    options = {
        "eta": data.draw(positive, "eta"),
        "mu": data.draw(st.floats(2.0**-10, 1.0), "mu"),
        "lambd": data.draw(st.just(0.0) | positive, "lambd"),
        "weight_decay": data.draw(st.just(0.0) | positive, "weight_decay"),
        "maximize": data.draw(st.booleans(), "maximize"),
        "grad_scale": data.draw(st.none() | positive, "grad_scale"),
    }
    values = data.draw(st.lists(st.tuples(number, number, number), min_size=1, max_size=20))
    param, grad, ax = np.array(values, dtype).T.copy()
    expected = [exact_step(*value, dtype, **options) for value in np.array(values, dtype)]
    asgd_(param, grad, ax, **options)
    assert list(zip(param, ax, strict=True)) == expected


def test_float64_stays_close_to_exact_arithmetic():
    """50 steps towards the minimum of (p - target)^2 / 2, in rationals and in float64."""
    lr, lambd, t0 = Fraction(1, 8), Fraction(1, 64), 10
    target = np.array([1.0, -3.0, 0.1, 1e3])
    param = np.array([0.0, 0.3, -0.7, 1.0])
    exact, exact_ax = [[Fraction(x) for x in param] for _ in range(2)]
    optimizer = ArrayASGD(param, lr=float(lr), lambd=float(lambd), alpha=1.0, t0=t0)
    eta, mu = lr, Fraction(1)
    for k in range(1, 51):
        optimizer.step(param - target)
        for i, goal in enumerate(target):
            exact[i] = exact[i] * (1 - lambd * eta) - eta * (exact[i] - Fraction(goal))
            exact_ax[i] += (exact[i] - exact_ax[i]) * mu
        eta, mu = lr / (1 + lambd * lr * k), 1 / Fraction(max(1, k - t0))
    # A step contracts the error, so no more than a few roundings of each step add up.
    for ours, right in ((param, exact), (optimizer.averages[0], exact_ax)):
        errors = [abs((Fraction(x) - y) / y) for x, y in zip(ours, right, strict=True)]
        assert max(errors) < 50 * np.finfo(np.float64).eps


@asks_early
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_arrays_have_the_bits_of_torch(dtype, double_scalars):
    rng = np.random.default_rng(4)

    def draw():
        return (rng.standard_normal((3, 7)) + 1j * rng.standard_normal((3, 7))).astype(dtype)

    param = draw()
    tensor = torch.tensor(param, requires_grad=True)
    options = {"lr": 0.3, "lambd": 1e-2, "t0": 10, "weight_decay": 0.1}
    ours = ArrayASGD(param, **options)
    theirs = torch.optim.ASGD([tensor], **options, foreach=False)
    for _ in range(40):
        grad = draw()
        tensor.grad = torch.tensor(grad)
        ours.step(grad)
        theirs.step()
        assert equal(param, tensor)
        assert equal(ours.averages[0], theirs.state[tensor]["ax"])


@pytest.mark.parametrize("mu", [None, 1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_arrays_are_the_float32_result_rounded_once(simd_level, dtype, mu):
    torch.manual_seed(0)
    param, grad, ax = torch.randn(3, 1000).to(dtype)
    wide = [x.float() for x in (param, grad, ax)]
    options = {"eta": 0.3, "mu": mu or 1.0, "lambd": 0.1, "weight_decay": 0.1, "grad_scale": 0.3}
    asgd_(param, grad, None if mu is None else ax, **options)
    asgd_(wide[0], wide[1], None if mu is None else wide[2], **options)
    assert torch.equal(param, wide[0].to(dtype))
    assert torch.equal(ax, wide[2].to(dtype))


def test_numpy_and_torch_halves_are_the_same():
    rng = np.random.default_rng(5)
    param, grad = rng.standard_normal((2, 300)).astype(np.float16)
    tensor, tensor_grad = torch.tensor(param), torch.tensor(grad)
    asgd_(param, grad, eta=0.1)
    asgd_(tensor, tensor_grad, eta=0.1)
    assert equal(param, tensor)
