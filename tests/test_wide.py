"""Averages that are wider than their params: the formula in the wider dtype, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from averaging import random_grads, step
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import averaged, exact_step, mu_of, reals, rounded
from runs import lazy_or_eager
from torch import nn
from twins import bits, parameters, same, twin

from asgd_fast import ASGD, _core, asgd_, set_num_threads, threads
from asgd_fast._rows.rows import Rows

pytestmark = pytest.mark.usefixtures("seeded")

T0 = 3
STEPS = 10  # of which the last five average two iterates and more
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0}
SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64 * 3 + 5)
# The dtype of the params, what is asked for, and what the averages then are.
WIDER = [
    (torch.float32, torch.float64, torch.float64),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.float64, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
    (torch.complex64, torch.float64, torch.complex128),
]


wider = pytest.mark.parametrize(("dtype", "asked", "wide"), WIDER, ids=str)


def within(n, shift, dtype, seed=0):
    """Random numbers in the midst of others, `shift` elements past a multiple of 128 bytes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n + 256, generator=generator, dtype=torch.float64).to(dtype)
    shift += -(base.data_ptr() // base.itemsize) % max(1, 128 // base.itemsize)
    return base, slice(shift, shift + n)


@lazy_or_eager
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}], ids=str
)
@wider
def test_torchs_formula_in_the_wider_dtype(simd_level, dtype, asked, wide, options, lazy):
    """From params at every alignment, whose own bits are those of a run without it."""
    views = [within(n, shift, dtype, n) for n, shift in product(SIZES, (0, 1, 5))]
    wholes = [base.clone() for base, _ in views]
    params = [nn.Parameter(base[part]) for base, part in views]
    alone = [twin(p) for p in params]
    optimizer = ASGD(params, average_dtype=asked, lazy_average=lazy, **OPTIONS, **options)
    narrow = ASGD(alone, lazy_average=lazy, **OPTIONS, **options)
    wanted = [torch.zeros_like(p.detach(), dtype=wide) for p in params]
    for k in range(1, STEPS + 1):
        step(optimizer, params, k)
        step(narrow, alone, k)
        for p, q, ax in zip(params, alone, wanted, strict=True):
            averaged(ax, p, mu_of(k, T0))
            same(p, q)
            same(optimizer.state[p]["ax"], ax)
    for (base, part), whole, p in zip(views, wholes, params, strict=True):
        whole[part] = p.detach()
        assert torch.equal(bits(base), bits(whole))  # what lies around is untouched


def torch_with_wide_averages(params, wide, **options):
    """Torch's own optimizer, whose averages were made wide by hand."""
    optimizer = torch.optim.ASGD(params, foreach=False, **options)
    for p in params:
        optimizer.state[p].update(
            step=torch.zeros(()),
            eta=torch.tensor(options["lr"]),
            mu=torch.ones(()),
            ax=torch.zeros_like(p.detach(), dtype=wide),
        )
    return optimizer


@lazy_or_eager
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_the_bits_of_torch_with_averages_made_wide_by_hand(dtype, options, lazy):
    wide = torch.promote_types(dtype, torch.float64)
    params = parameters((3,), (4, 5), (), (1000,), dtype=dtype)
    others = [twin(p) for p in params]
    options = {**OPTIONS, **options}
    ours = ASGD(params, average_dtype=torch.float64, lazy_average=lazy, **options)
    theirs = torch_with_wide_averages(others, wide, **options)
    for k in range(STEPS):
        step(ours, params, k)
        step(theirs, others, k)
    for p, q in zip(params, others, strict=True):
        same(p, q)
        for name in ("step", "eta", "mu", "ax"):
            same(ours.state[p][name], theirs.state[q][name])


def test_one_optimizer_over_params_of_all_dtypes():
    params = [nn.Parameter(torch.randn(9).to(dtype)) for dtype, _, _ in WIDER]
    params.append(nn.Parameter(torch.randn(9, dtype=torch.float64)))
    optimizer = ASGD(params, average_dtype=torch.float32, **OPTIONS)
    wanted = [torch.float32] * 5 + [torch.complex64, torch.float64]
    averages = [torch.zeros(9, dtype=dtype) for dtype in wanted]
    for k in range(1, STEPS + 1):
        step(optimizer, params, k)
        for p, ax in zip(params, averages, strict=True):
            averaged(ax, p, mu_of(k, T0))
    for p, ax in zip(params, averages, strict=True):
        same(optimizer.state[p]["ax"], ax)


def expected(p, g, ax, mu, *, eta, lambd, weight_decay):
    """The contract in torch's operations; half types through float32, rounded once."""
    dtype = p.dtype
    if dtype.itemsize == 2:
        p, g = p.float(), g.float()
    p, g = reals(p), reals(g)
    g = g.add(p, alpha=weight_decay) if weight_decay else g
    p = p.mul(1 - lambd * eta).add_(g, alpha=-eta)
    p = torch.view_as_complex(p) if dtype.is_complex else p.to(dtype)
    ax = ax.clone()
    averaged(ax, p, mu)
    return p, ax


SCALARS = {"eta": 0.25, "lambd": 0.5, "weight_decay": 0.125}


@pytest.mark.parametrize("mu", [1.0, 0.3])
@wider
def test_every_size_and_alignment_of_the_engine(simd_level, dtype, asked, wide, mu):
    for n, shifts in product(SIZES, ((0, 0, 0), (1, 2, 3), (5, 0, 31))):
        arrays = [
            within(n, shift, kind, i)
            for i, (shift, kind) in enumerate(zip(shifts, (dtype, dtype, wide), strict=True))
        ]
        wholes = [base.clone() for base, _ in arrays]
        p, g, ax = (base[part] for base, part in arrays)
        p_after, ax_after = expected(p, g, ax, mu, **SCALARS)
        asgd_(p, g, ax, mu=mu, **SCALARS)
        for (base, part), whole, after in zip(arrays, wholes, (p_after, g, ax_after), strict=True):
            whole[part] = after
            assert torch.equal(bits(base), bits(whole)), (n, shifts)


@pytest.mark.heavy
@pytest.mark.parametrize("mu", [1.0, 0.3])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_any_number_of_threads(n_threads, mu):
    """Chunks end anywhere in params, and twice or four times as far in averages."""
    assert threads.openmp_runtime() != "not found"
    rows = []
    for i, n in enumerate((3, 0, 1, 200_003, 64, 16, 100_000, 5000, *range(40), 7)):
        dtype, _, wide = WIDER[i % len(WIDER)]
        rows.append(
            [
                torch.randn(n, generator=torch.Generator().manual_seed(i)).to(kind)
                for kind in (dtype, dtype, wide)
            ]
        )
    wanted = [expected(*row, mu, **SCALARS) for row in rows]
    table = Rows(("params[{}]", "grads[{}]", "axs[{}]"))
    table.extend(*(list(column) for column in zip(*rows, strict=True)), mu=mu, **SCALARS)
    table.check_overlap()
    _core.update(table, n_threads)
    for (p, _, ax), (p_after, ax_after) in zip(rows, wanted, strict=True):
        assert torch.equal(p, p_after)
        assert torch.equal(ax, ax_after)


@pytest.mark.heavy
@wider
def test_large_params_with_two_threads(two_threads, dtype, asked, wide):
    """So large that the step uses both, and the chunks of a share are several."""
    n = (5 << 20) // dtype.itemsize + 13
    p = nn.Parameter(torch.randn(n, dtype=torch.float32).to(dtype))
    q = twin(p)
    optimizer = ASGD([p], average_dtype=asked, lr=0.3, lambd=1e-2, t0=0, lazy_average=False)
    ax = torch.zeros(n, dtype=wide)
    for k in range(1, 5):
        (grad,) = random_grads([p], k)
        p.grad = grad
        optimizer.step()
        averaged(ax, p, mu_of(k, 0))
    assert torch.equal(bits(optimizer.state[p]["ax"]), bits(ax))
    set_num_threads(1)
    alone = ASGD([q], average_dtype=asked, lr=0.3, lambd=1e-2, t0=0, lazy_average=False)
    for k in range(1, 5):
        step(alone, [q], k)
    same(p, q)
    same(optimizer.state[p]["ax"], alone.state[q]["ax"])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(np.float32, np.float64), (np.float16, np.float32), (np.float16, np.float64)],
    ids=str,
)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_each_line_of_the_contract_rounds_once(dtype, wide, data):
    width = np.finfo(dtype).bits
    number = st.floats(2.0**-4, 2.0**4, width=width).flatmap(
        lambda x: st.sampled_from([x, -x])
    ) | st.just(0.0)
    average = st.floats(2.0**-4, 2.0**4, width=np.finfo(wide).bits).flatmap(
        lambda x: st.sampled_from([x, -x])
    ) | st.just(0.0)
    positive = st.floats(2.0**-5, 2.0**2)
    mu = data.draw(st.just(1.0) | st.floats(2.0**-10, 1.0), "mu")
    options = {
        "eta": data.draw(positive, "eta"),
        "lambd": data.draw(st.just(0.0) | positive, "lambd"),
        "weight_decay": data.draw(st.just(0.0) | positive, "weight_decay"),
        "maximize": data.draw(st.booleans(), "maximize"),
        "grad_scale": data.draw(st.none() | positive, "grad_scale"),
    }
    values = data.draw(st.lists(st.tuples(number, number, average), min_size=1, max_size=20))
    param, grad = (np.array([row[i] for row in values], dtype) for i in range(2))
    ax = np.array([row[2] for row in values], wide)
    computed = np.float32 if dtype is np.float16 else dtype
    wanted = []
    for p, g, a in zip(param, grad, ax, strict=True):
        new_p, _ = exact_step(p, g, 0, computed, mu=1, **options)
        new_p = dtype(new_p)  # half types are rounded once more, when they are stored
        p_, a_ = Fraction(float(new_p)), Fraction(float(a))
        moved = rounded(rounded(p_ - a_, wide) * rounded(Fraction(mu), wide), wide)
        new_a = p_ if mu == 1 else rounded(a_ + moved, wide)
        wanted.append((new_p, wide(float(new_a))))
    asgd_(param, grad, ax, mu=mu, **options)
    assert list(zip(param, ax, strict=True)) == wanted


@pytest.mark.parametrize("mu", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_special_values_flow_as_in_torch(simd_level, dtype, mu):
    largest = torch.finfo(dtype).max
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, largest])
    p, g, ax = (grid.reshape(-1) for grid in torch.meshgrid([special] * 3, indexing="ij"))
    p, g, ax = p.to(dtype), g.to(dtype), ax.double().clone()
    p_after, ax_after = expected(p, g, ax, mu, eta=0.5, lambd=0.5, weight_decay=0.0)
    asgd_(p, g, ax, eta=0.5, mu=mu, lambd=0.5)
    for ours, theirs in ((p, p_after), (ax, ax_after)):
        number = ~torch.isnan(theirs)
        assert torch.equal(torch.isnan(ours), ~number)
        assert torch.equal(bits(ours[number]), bits(theirs[number]))


@pytest.mark.parametrize("role", ["params", "grads", "axs"])
def test_the_larger_memory_of_a_wide_average_must_not_overlap(role):
    """Of eight doubles, as many bytes as sixteen floats, which were free before it was wide."""
    memory = np.zeros(32)
    floats = memory.view(np.float32)

    def call(start, ax):
        arrays = {
            "params": [np.ones(8, np.float32) for _ in range(2)],
            "grads": [np.ones(8, np.float32) for _ in range(2)],
            "axs": [ax, np.zeros(8, np.float32)],
        }
        arrays[role][1] = floats[start : start + 8]
        asgd_(**arrays, eta=1.0)

    call(12, floats[:8])
    call(16, memory[:8])
    before = memory.copy()
    with pytest.raises(ValueError, match="shares memory with"):
        call(12, memory[:8])
    assert np.array_equal(memory, before)


def test_overlap_with_an_average_that_became_wide_at_its_address():
    """Nothing else changed since the call that was found free of overlaps."""
    memory = np.zeros(32)
    floats = memory.view(np.float32)
    params, grads = [[np.ones(8, np.float32) for _ in range(2)] for _ in range(2)]
    other = floats[8:16]
    asgd_(params, grads, [floats[:8], other], eta=1.0)
    with pytest.raises(ValueError, match="shares memory with"):
        asgd_(params, grads, [memory[:8], other], eta=1.0)


@pytest.mark.parametrize("foreach", [True, False, None], ids=str)
@wider
def test_the_averages_of_params_that_go_to_torch(dtype, asked, wide, foreach):
    """Gappy ones, beside one that the engine takes."""
    params = [
        nn.Parameter(torch.randn(4, 6).to(dtype)[:, ::2]),
        nn.Parameter(torch.randn(20).to(dtype)[::2]),
        nn.Parameter(torch.randn(7).to(dtype)),
    ]
    assert not params[0].is_contiguous()
    others = []
    for p in params:
        whole = torch.zeros(*p.shape, 2, dtype=dtype)
        whole[..., 1] = p.detach()
        others.append(nn.Parameter(whole[..., 1]) if p is not params[2] else twin(p))
    wanted = [torch.zeros(p.shape, dtype=wide) for p in params]
    optimizer = ASGD(params, average_dtype=asked, foreach=foreach, **OPTIONS)
    narrow = ASGD(others, foreach=False, **OPTIONS)
    for k in range(1, STEPS + 1):
        step(optimizer, params, k)
        step(narrow, others, k)
        for p, q, ax in zip(params, others, wanted, strict=True):
            averaged(ax, p, mu_of(k, T0))
            assert torch.equal(p, q)
    for p, ax in zip(params, wanted, strict=True):
        assert optimizer.state[p]["ax"].dtype == wide
        assert torch.equal(bits(optimizer.state[p]["ax"]), bits(ax))


@pytest.mark.parametrize("option", ["differentiable", "expanded gradient", "shared memory"])
def test_the_averages_of_what_else_goes_to_torch(option):
    memory = torch.randn(12)
    own = [memory[:8], memory[4:]] if option == "shared memory" else [memory[:4], memory[4:]]
    extra = {"differentiable": True} if option == "differentiable" else {}
    params = [nn.Parameter(x) for x in own]
    if option == "differentiable":
        params = [p.clone() for p in params]
    optimizer = ASGD(params, average_dtype=torch.float64, **extra, **OPTIONS)
    other = memory.clone()
    theirs_params = [other[:8], other[4:]] if option == "shared memory" else [other[:4], other[4:]]
    theirs = torch_with_wide_averages(theirs_params, torch.float64, **OPTIONS)
    for _ in range(STEPS):
        for p, q in zip(params, theirs_params, strict=True):
            grad = torch.randn(1).expand(p.shape) if "grad" in option else torch.randn(p.shape)
            p.grad = q.grad = grad
        optimizer.step()
        theirs.step()
    for p, q in zip(params, theirs_params, strict=True):
        assert torch.equal(p, q)
        ours = optimizer.state[p]["ax"]
        assert ours.dtype == torch.float64
        assert torch.equal(bits(ours.detach()), bits(theirs.state[q]["ax"]))
