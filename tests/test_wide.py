"""Averages that are wider than their params: torch's formula in the wider dtype."""

from __future__ import annotations

import copy
import io
import math
import pickle
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import exact_step, rounded
from torch import nn
from twins import bits, parameters, same, twin

from asgd_fast import ASGD, ArrayASGD, _core, asgd_, get_num_threads, set_num_threads, threads
from asgd_fast._rows.rows import Rows

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
lazy_or_eager = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    before = get_num_threads()
    set_num_threads(2)
    assert get_num_threads() == 2
    yield
    set_num_threads(before)


def reals(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def averaged(ax, p, mu):
    """The last lines of torch's step, on an average of any dtype."""
    if mu == 1:
        ax.copy_(p)
    else:
        reals(ax).add_(reals(p.to(ax.dtype)).sub(reals(ax)).mul_(mu))


def mu_of(step, t0=T0):
    """The weight of the iterate of a step, as torch rounds it."""
    return torch.tensor(1 / max(1, step - 1 - t0))


def random_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def step(optimizer, params, seed):
    for p, grad in zip(params, random_grads(params, seed), strict=True):
        p.grad = grad
    optimizer.step()


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
            averaged(ax, p, mu_of(k))
            same(p, q)
            if k >= T0 + 2:  # before, a lazy average has no memory of its own
                same(optimizer.state[p]["ax"], ax)
            else:
                assert torch.equal(optimizer.state[p]["ax"], p)
    for (base, part), whole, p in zip(views, wholes, params, strict=True):
        whole[part] = p.detach()
        assert torch.equal(bits(base), bits(whole))  # what lies around is untouched


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


def test_one_optimizer_over_params_of_all_dtypes():
    params = [nn.Parameter(torch.randn(9).to(dtype)) for dtype, _, _ in WIDER]
    params.append(nn.Parameter(torch.randn(9, dtype=torch.float64)))
    optimizer = ASGD(params, average_dtype=torch.float32, **OPTIONS)
    wanted = [torch.float32] * 5 + [torch.complex64, torch.float64]
    averages = [torch.zeros(9, dtype=dtype) for dtype in wanted]
    for k in range(1, STEPS + 1):
        step(optimizer, params, k)
        for p, ax in zip(params, averages, strict=True):
            averaged(ax, p, mu_of(k))
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
        (ASGD, "float32", TypeError, "^average_dtype: expected None, torch.float32 .* 'float32'"),
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


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
# Without a step, lazy, with the first iterate of the average, and after some.
at = pytest.mark.parametrize("steps", [0, 2, T0 + 1, T0 + 2, T0 + 3, T0 + 6])


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
            oracle.state[q] = {
                name: value.detach().float().clone() for name, value in ours.state[p].items()
            }
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
            averaged(wanted[i], q, mu_of(k))
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
            averaged(ax, p, mu_of(k))
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


def ulps_off(average, dtype, iterates):
    """How far averages, narrowed, are from the exact means, in ulps of the narrow dtype."""
    worst = 0
    for ax, column in zip(average, iterates.T, strict=True):
        mean = Fraction(math.fsum(column)) / len(column)  # the sum is rounded once
        ulp = Fraction(float(np.spacing(dtype(float(abs(mean))))))
        worst = max(worst, abs(Fraction(float(dtype(ax))) - mean) / ulp)
    return float(worst)


def means_of(iterates, *averages):
    """Let `asgd_` average iterates that are given, with eta and grads that leave them alone."""
    param = np.zeros_like(iterates[0])
    grad = np.zeros_like(param)
    params, grads = [param] + [param.copy() for _ in averages[1:]], [grad for _ in averages]
    for k, row in enumerate(iterates, start=1):
        for p in params:
            p[:] = row
        asgd_(params, grads, list(averages), eta=1.0, mu=1 / k, lambd=0.0)


DTYPE_PAIRS = [(np.float32, np.float64), (np.float16, np.float32), (np.float16, np.float64)]


def random_walk(steps, dtype):
    """Iterates about values of different sizes, as noisy as they are large."""
    rng = np.random.default_rng(0)
    middle = np.array([1.0, 0.7, -3.0, 1.5, -0.1])
    return (middle + rng.standard_normal((steps, 5))).astype(dtype)


@pytest.mark.heavy
@pytest.mark.parametrize(("dtype", "wide"), DTYPE_PAIRS, ids=str)
def test_a_wide_average_is_the_mean(dtype, wide):
    iterates = random_walk(30_000, dtype)
    averages = np.zeros(5, wide), np.zeros(5, dtype)
    means_of(iterates, *averages)
    assert ulps_off(averages[0], dtype, iterates) <= 1
    assert ulps_off(averages[1], dtype, iterates) > 1


@pytest.mark.heavy
@pytest.mark.parametrize(("dtype", "wide"), DTYPE_PAIRS, ids=str)
def test_a_wide_average_is_the_mean_of_a_million_iterates(dtype, wide):
    iterates = random_walk(1_000_000, dtype)
    averages = np.zeros(5, wide), np.zeros(5, dtype)
    means_of(iterates, *averages)
    assert ulps_off(averages[0], dtype, iterates) <= 1
    assert ulps_off(averages[1], dtype, iterates) > 10


@pytest.mark.heavy
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_wide_average_of_bfloat16_moves_on(wide):
    """Through the optimizer, whose weights are rounded to float32."""
    steps = 100_000
    iterates = (torch.randn(steps, 5) + torch.tensor([1.0, 0.7, -3.0, 1.5, -0.4])).bfloat16()
    params = [nn.Parameter(torch.zeros(5).bfloat16()) for _ in range(2)]
    optimizers = [
        ASGD([p], lr=1.0, lambd=0.0, t0=-1, average_dtype=dtype)
        for p, dtype in zip(params, (wide, None), strict=True)
    ]
    for p in params:
        p.grad = torch.zeros_like(p)
    for row in iterates:
        for p, optimizer in zip(params, optimizers, strict=True):
            p.data.copy_(row)
            optimizer.step()
    mean = iterates.double().mean(dim=0)
    ulp = torch.exp2(torch.floor(torch.log2(mean.abs())) - 7)
    off = [
        ((optimizer.state[p]["ax"].bfloat16().double() - mean).abs() / ulp).max()
        for p, optimizer in zip(params, optimizers, strict=True)
    ]
    assert off[0] <= 1
    assert off[1] > 1


@pytest.mark.heavy
def test_a_wide_average_of_the_optimizer_is_the_mean():
    """Although its weights are rounded to float32."""
    iterates = random_walk(100_000, np.float32)
    p = nn.Parameter(torch.zeros(5))
    optimizer = ASGD([p], lr=1.0, lambd=0.0, t0=-1, average_dtype=torch.float64)
    p.grad = torch.zeros(5)
    for row in torch.tensor(iterates):
        p.data.copy_(row)
        optimizer.step()
    assert ulps_off(optimizer.state[p]["ax"].numpy(), np.float32, iterates) <= 1
