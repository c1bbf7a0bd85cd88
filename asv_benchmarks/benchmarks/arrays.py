"""The update of plain arrays by ``asgd_`` and ``ArrayASGD``, without torch's optimizer."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from .cases import ELEMENTS, TENSORS, params_of, skip_old, thread_clock, titled, use_threads

if TYPE_CHECKING:
    from collections.abc import Callable

# What commits say that take no such params, or no such averages.
UNKNOWN_DTYPE = re.compile(r": dtype \w+ (is not supported|does not match)")

# The weight of the new iterate in the average, None without average.
AVERAGES: dict[str, float | None] = {"no average": None, "copy": 1.0, "averaging": 0.1}


@lru_cache(maxsize=1)
def _update(
    library: str, tensors: int | str, average: str, dtype: str = "float32", wide: bool = False
) -> Callable[[], object]:
    from asgd_fast import asgd_

    use_threads(1)
    params, grads, axs = _arrays(library, tensors, dtype, wide=wide)
    mu = AVERAGES[average]
    if mu is None:
        return partial(asgd_, params, grads, eta=0.01)
    update = partial(asgd_, params, grads, axs, eta=0.01, mu=mu)
    try:
        update()
    except ValueError as error:
        if not UNKNOWN_DTYPE.search(str(error)):
            raise
        skip_old(f"this commit does not take the arrays: {error}")
    return update


def _arrays(
    library: str, tensors: int | str, dtype: str, *, wide: bool = False
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return params, gradients and averages, as arrays of NumPy or torch."""
    params = params_of(tensors, getattr(torch, dtype))
    data = [p.detach() for p in params]
    grads = [torch.as_tensor(p.grad) for p in params]
    wider = torch.promote_types(params[0].dtype, torch.float64 if wide else params[0].dtype)
    axs = [p.to(wider, copy=True) for p in data]
    if library == "NumPy":
        return [x.numpy() for x in data], [x.numpy() for x in grads], [x.numpy() for x in axs]
    return data, grads, axs


@lru_cache(maxsize=1)
def _array_step(tensors: str, t0: float) -> Callable[[], object]:
    from asgd_fast import ArrayASGD

    use_threads(1)
    params, grads, _ = _arrays("NumPy", tensors, "float32")
    optimizer = ArrayASGD(params, t0=t0)
    return partial(optimizer.step, grads)


class Sizes:
    """One float32 NumPy array of so many elements, one thread."""

    version = "2"
    timer = thread_clock
    params = (ELEMENTS, tuple(AVERAGES))
    param_names = ("elements", "average")

    @titled("asgd_() of one array")
    def time_asgd(self, elements: int, average: str) -> None:
        _update("NumPy", elements, average)()


class Arrays:
    """Many float32 arrays, or a tiny one, averaging: what an update costs apart from memory."""

    version = "2"
    timer = thread_clock
    params = (("NumPy", "torch"), TENSORS)
    param_names = ("library", "tensors")

    @titled("asgd_() of many arrays")
    def time_asgd(self, library: str, tensors: str) -> None:
        _update(library, tensors, "averaging")()


class Dtypes:
    """One torch tensor of a million elements of each dtype, averaging; wide is in float64."""

    version = "2"
    timer = thread_clock
    params = (
        ("float32", "float64", "complex64", "float16", "bfloat16"),
        ("averages of its dtype", "wide averages"),
    )
    param_names = ("dtype", "averages")
    skip_params = (("float64", "wide averages"),)  # nothing is wider

    @titled("asgd_() of 1,000,000 elements, by dtype")
    def time_asgd(self, dtype: str, averages: str) -> None:
        _update("torch", 10**6, "averaging", dtype, averages == "wide averages")()


class Optimizer:
    """Steps of ``ArrayASGD`` over NumPy arrays: its averages are copies, or take part."""

    version = "2"
    timer = thread_clock
    params = (TENSORS, ("copy", "averaging"))
    param_names = ("tensors", "average")

    @titled("ArrayASGD.step() of many arrays")
    def time_step(self, tensors: str, average: str) -> None:
        _array_step(tensors, 1e6 if average == "copy" else 0.0)()
