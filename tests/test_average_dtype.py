"""average_dtype: which dtypes averages get, and keep in checkpoints, copies and saved states."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from averaging import OPTIONS, STEPS, T0, random_grads, step
from oracle import averaged, mu_of
from runs import WAYS, lazy_or_eager
from torch import nn
from twins import NAMES, parameters, same, twin

from asgd_fast import ASGD, ArrayASGD

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
        (torch.bfloat16, None),
    ],
    ids=str,
)
def test_what_is_as_wide_already_keeps_its_dtype_and_bits(dtype, asked):
    params = parameters((3,), (4, 5), dtype=dtype)
    others = [twin(p) for p in params]
    ours, plain = ASGD(params, average_dtype=asked, **OPTIONS), ASGD(others, **OPTIONS)
    for k in range(STEPS):
        step(ours, params, k)
        step(plain, others, k)
    for p, q in zip(params, others, strict=True):
        assert ours.state[p]["ax"].dtype == dtype
        same(ours.state[p]["ax"], plain.state[q]["ax"])


@lazy_or_eager
def test_averages_of_empty_params_are_wide_too(lazy):
    params = parameters((0,), (3, 0))
    optimizer = ASGD(params, average_dtype=torch.float64, lazy_average=lazy, **OPTIONS)
    for k in range(STEPS):
        step(optimizer, params, k)
    assert [optimizer.state[p]["ax"].dtype for p in params] == [torch.float64] * 2


def test_the_averages_of_arrays_in_any_layout(double_scalars):
    """The same as those of torch params, where both have scalars in double."""
    rng = np.random.default_rng(0)
    arrays = [
        np.asfortranarray(rng.standard_normal((3, 4)).astype(np.float32)),
        rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(1, 2, 0),
        rng.standard_normal(()).astype(np.float32),
        rng.standard_normal(17).astype(np.float16),
    ]
    tensors = [nn.Parameter(torch.tensor(x)) for x in arrays]
    like = [np.empty_like(x) for x in arrays]
    ours = ArrayASGD(arrays, average_dtype="float64", **OPTIONS)
    theirs = ASGD(tensors, average_dtype=torch.float64, **OPTIONS)
    for k in range(STEPS):
        grads = random_grads(tensors, k)
        for p, grad in zip(tensors, grads, strict=True):
            p.grad = grad
        for x, grad in zip(like, grads, strict=True):
            x[...] = grad.numpy()
        ours.step(like)
        theirs.step()
    for x, ax, p in zip(arrays, ours.averages, tensors, strict=True):
        assert np.array_equal(x, p.detach().numpy())
        assert ax.dtype == np.float64
        assert [s // 8 for s in ax.strides] == [s // x.itemsize for s in x.strides]
        assert np.array_equal(ax, theirs.state[p]["ax"].numpy())


@pytest.mark.parametrize("asked", [torch.float32, "float32", np.float32, np.dtype("float32"), "f4"])
def test_array_asgd_takes_the_dtypes_of_all_libraries(asked):
    params = [np.ones(3, np.float16), np.ones(3, np.float32), np.ones(3), torch.ones(3).bfloat16()]
    optimizer = ArrayASGD(params, average_dtype=asked)
    assert optimizer.average_dtype == np.dtype("float32")
    wanted = [np.float32, np.float32, np.float64, torch.float32]
    assert [ax.dtype for ax in optimizer.averages] == wanted


@pytest.mark.parametrize(
    ("make", "asked", "error", "message"),
    [
        (ASGD, 32, TypeError, "^average_dtype: expected None, torch.float32 .* 32 of type int"),
        (ASGD, "half", ValueError, "^Invalid average_dtype: half"),
        (ASGD, np.float64, TypeError, "^average_dtype: expected None, torch.float32"),
        (ASGD, torch.float16, ValueError, "^Invalid average_dtype: torch.float16"),
        (ASGD, torch.complex128, ValueError, "^Invalid average_dtype: torch.complex128"),
        (ArrayASGD, "float16", ValueError, "^Invalid average_dtype: float16"),
        (ArrayASGD, np.int64, ValueError, "^Invalid average_dtype: int64"),
        (ArrayASGD, torch.complex64, ValueError, "^Invalid average_dtype: complex64"),
        (ArrayASGD, torch.bfloat16, ValueError, "^Invalid average_dtype: bfloat16"),
        (ArrayASGD, "wide", TypeError, "^average_dtype: expected None, float32 or .* 'wide'$"),
    ],
)
def test_other_dtypes_are_refused(make, asked, error, message):
    params = parameters((3,)) if make is ASGD else [np.ones(3, np.float32)]
    with pytest.raises(error, match=message):
        make(params, average_dtype=asked)


# Without a step, before averaging begins, with the first iterate of the average, and after some.
at = pytest.mark.parametrize("steps", [0, 2, T0 + 1, T0 + 2, T0 + 3, T0 + 6])


ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@at
@ways
def test_a_checkpoint_goes_on_in_torch(way, steps):
    """Which narrows it, to the dtype of the params."""
    params = parameters((3,), (4, 5))
    ours = ASGD(params, average_dtype=torch.float64, **OPTIONS)
    for k in range(steps):
        step(ours, params, k)
    others, byhand = ([twin(p) for p in params] for _ in range(2))
    theirs = torch.optim.ASGD(others, foreach=False, lr=9.0)
    theirs.load_state_dict(way(ours.state_dict()))
    oracle = torch.optim.ASGD(byhand, foreach=False, **OPTIONS)
    for p, q in zip(params, byhand, strict=True):
        if steps:
            oracle.state[q] = {name: ours.state[p][name].detach().float().clone() for name in NAMES}
    for k in range(steps, steps + T0 + 4):
        step(theirs, others, k)
        step(oracle, byhand, k)
    for p, q in zip(others, byhand, strict=True):
        same(p, q)
        same(theirs.state[p]["ax"], oracle.state[q]["ax"])


@at
@pytest.mark.parametrize("source", ["torch", "narrow", "wide"])
@pytest.mark.parametrize("asked", [None, torch.float64], ids=str)
@ways
def test_loading_keeps_the_dtype_asked_for(way, source, asked, steps):
    """With the saved average, converted, whatever it was: torch's formula goes on in it."""
    params = parameters((3,), (4, 5))
    kind = torch.float64 if source == "wide" else None
    before = (
        torch.optim.ASGD(params, foreach=False, **OPTIONS)
        if source == "torch"
        else ASGD(params, average_dtype=kind, **OPTIONS)
    )
    for k in range(1, steps + 1):
        step(before, params, k)
    others = [twin(p) for p in params]
    after = ASGD(others, lr=9.0, average_dtype=asked)
    after.load_state_dict(way(before.state_dict()))
    wanted = [
        before.state[p]["ax"].detach().to(asked or torch.float32, copy=True) if steps else None
        for p in params
    ]
    for k in range(steps + 1, steps + T0 + 5):
        step(before, params, k)
        step(after, others, k)
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            same(p, q)
            if wanted[i] is None:
                wanted[i] = torch.zeros_like(p.detach(), dtype=asked or torch.float32)
            averaged(wanted[i], q, mu_of(k, T0))
    for q, ax in zip(others, wanted, strict=True):
        same(after.state[q]["ax"], ax)


@at
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_stay_wide(duplicate, steps):
    params = parameters((3,), (4, 5), dtype=torch.bfloat16)
    optimizer = ASGD(params, average_dtype=torch.float32, **OPTIONS)
    for k in range(steps):
        step(optimizer, params, k)
    other = duplicate(optimizer)
    copies = other.param_groups[0]["params"]
    assert other.average_dtype == torch.float32
    for k in range(steps, steps + T0 + 4):
        step(optimizer, params, k)
        step(other, copies, k)
    for p, q in zip(params, copies, strict=True):
        assert q.data_ptr() != p.data_ptr()
        same(p, q)
        same(optimizer.state[p]["ax"], other.state[q]["ax"])
        assert other.state[q]["ax"].dtype == torch.float32


def test_saved_averages_of_arrays_get_the_dtype_asked_for(through):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((STEPS, 5)).astype(np.float32)

    def run(optimizer, param, rows):
        for row in rows:
            param[:] = row
            optimizer.step(np.zeros(5, np.float32))

    options = {"lr": 1.0, "lambd": 0.0, "t0": 0}
    for one, other in product([None, "float64"], repeat=2):
        param = np.zeros(5, np.float32)
        first = ArrayASGD(param, average_dtype=one, **options)
        run(first, param, values[:6])
        second = ArrayASGD(param, average_dtype=other)
        second.load_state_dict(through(first.state_dict()))
        (ax,) = second.averages
        dtype = np.dtype(other or "float32")
        assert ax.dtype == dtype
        wanted = first.averages[0].astype(dtype)
        assert np.array_equal(ax, wanted)
        run(second, param, values[6:])
        for k, row in enumerate(values[6:], start=7):
            wanted += (row.astype(dtype) - wanted) * dtype.type(1 / (k - 1))
        assert np.array_equal(ax, wanted)
