"""Optimizers whose averages have begun, and all that may be found in their params and state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from twins import bits

from asgd_fast import ASGD

# For tests that ask for averages before they begin, too.
asks_early = pytest.mark.filterwarnings("ignore::asgd_fast.AveragingNotBegunWarning")
# For tests that take checkpoints where the averages stand in the params.
saves_inside = pytest.mark.filterwarnings("ignore:state_dict. called inside:UserWarning")

T0 = 2
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0, "weight_decay": 0.01}
BEGUN = T0 + 2  # after so many steps the averages have begun; two more make them differ
STEPS = BEGUN + 3
LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 50),
    "transposed": lambda: torch.randn(5, 7).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "every other": lambda: torch.randn(20)[::2],
    "columns": lambda: torch.randn(6, 8)[:, 2:5],
}


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
]


def of_all_layouts(dtype):
    """A param of each layout; the gappy ones stay within larger memory."""
    params = []
    for make in LAYOUTS.values():
        tensor = make()
        whole = torch.zeros(
            tensor.untyped_storage().nbytes() // tensor.itemsize + 1,
            dtype=dtype,
        )
        view = whole.as_strided(tensor.shape, tensor.stride(), 1)
        params.append(nn.Parameter(view.copy_(tensor)))
    return params


def random_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def step(optimizer, params, seed=0):
    for p, grad in zip(params, random_grads(params, seed), strict=True):
        p.grad = grad
    optimizer.step()


def stepped(params, steps=STEPS, **options):
    optimizer = ASGD(params, **{**OPTIONS, **options})
    for k in range(steps):
        step(optimizer, params, k)
    return optimizer


def facts(optimizer):
    """The bits of all params and of their state, and where they are."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append((p.data_ptr(), p.stride(), p.dtype, bits(p.detach()).tolist()))
            for name, value in optimizer.state.get(p, {}).items():
                found.append((name, id(value), value.data_ptr(), value.dtype, value.stride()))
                found.append(bits(value.detach()).tolist())
    return found


def averages_of(optimizer, params):
    return [optimizer.state[p]["ax"].detach().clone() for p in params]


def same_values(ours, wanted):
    """The bits, whatever the layout."""
    assert ours.shape == wanted.shape
    assert ours.dtype == wanted.dtype
    assert torch.equal(bits(ours.detach()), bits(wanted.detach()))


class InsideError(Exception):
    """What happens inside."""


def model_with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def trained(model, **options):
    optimizer = ASGD(model.parameters(), **{**OPTIONS, **options})
    for k in range(STEPS):
        torch.manual_seed(k)
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    return optimizer


def arrays_of_all_kinds():
    rng = np.random.default_rng(0)
    kinds = [
        rng.standard_normal((3, 4)),
        np.asfortranarray(rng.standard_normal((5, 6)).astype(np.float32)),
        rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(1, 2, 0),
        rng.standard_normal(()).astype(np.float64),
        np.zeros((3, 0), np.float32),
        rng.standard_normal(33).astype(np.float16),
        (rng.standard_normal(5) + 1j * rng.standard_normal(5)).astype(np.complex64),
    ]
    return [*kinds, torch.randn(5, 7).t(), torch.randn(40).to(torch.bfloat16)]


def grads_like(arrays, k):
    rng = np.random.default_rng(k)
    grads = []
    for x in arrays:
        grad = x.clone() if isinstance(x, torch.Tensor) else x.copy(order="K")
        grad[...] = (
            rng.standard_normal(x.shape)
            if not isinstance(x, torch.Tensor)
            else (torch.tensor(rng.standard_normal(tuple(x.shape))))
        )
        grads.append(grad)
    return grads


def raw(array):
    """The bytes of an array in the order of its indices, with its dtype."""
    if isinstance(array, torch.Tensor):
        return str(array.dtype), bits(array).numpy().tobytes()
    return str(array.dtype), array.tobytes()


def rounded_to(ax, like):
    return ax.to(like.dtype) if isinstance(ax, torch.Tensor) else ax.astype(like.dtype)


def run(optimizer, arrays, steps=STEPS, start=0):
    for k in range(start, start + steps):
        optimizer.step(grads_like(arrays, k))
