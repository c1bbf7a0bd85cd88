"""A whole step of ``asgd_fast.ASGD``, as a training loop makes it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .cases import (
    ELEMENTS,
    PHASES,
    TENSORS,
    optimizer_of,
    params_of,
    thread_clock,
    titled,
    use_threads,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

FIRST_PHASES = ("lazy", "copy", "averaging")


@lru_cache(maxsize=1)
def _step(
    tensors: int | str, phase: str, dtype: str = "float32", threads: int = 1
) -> Callable[[], object]:
    use_threads(threads)
    return optimizer_of(params_of(tensors, getattr(torch, dtype)), phase).step


@lru_cache(maxsize=1)
def _training(tensors: str, phase: str) -> tuple[torch.optim.ASGD, list[Tensor]]:
    use_threads(1)
    params = params_of(tensors)
    return optimizer_of(params, phase), params


class Sizes:
    """One float32 tensor of so many elements, one thread."""

    version = "2"
    timer = thread_clock
    params = (ELEMENTS, FIRST_PHASES)
    param_names = ("elements", "phase")

    @titled("ASGD.step() of one tensor")
    def time_step(self, elements: int, phase: str) -> None:
        _step(elements, phase)()


class Tensors:
    """Many float32 tensors, or a tiny one: what a step costs apart from memory."""

    version = "2"
    timer = thread_clock
    params = (TENSORS, ("lazy", "averaging"))
    param_names = ("tensors", "phase")

    @titled("ASGD.step() of many tensors")
    def time_step(self, tensors: str, phase: str) -> None:
        _step(tensors, phase)()


class AfterBackward:
    """Many float32 tensors, or a tiny one, after a backward pass: gradients are new and not cached.

    Each step is timed alone, and `setup` makes its gradients.
    """

    version = "1"
    timer = thread_clock
    number = 1
    repeat = 10
    warmup_time = 0.0
    params = (TENSORS, ("lazy", "averaging"))
    param_names = ("tensors", "phase")

    def setup(self, tensors: str, phase: str) -> None:
        from measure import pass_backward

        optimizer, params = _training(tensors, phase)
        pass_backward(optimizer, params)
        self.step = optimizer.step

    @titled("ASGD.step() of many tensors, after a backward pass")
    def time_step(self, tensors: str, phase: str) -> None:
        self.step()


class Dtypes:
    """One tensor of a million elements of each dtype, one thread."""

    version = "2"
    timer = thread_clock
    params = (("float32", "float64", "complex64", "float16", "bfloat16"), FIRST_PHASES)
    param_names = ("dtype", "phase")

    @titled("ASGD.step() of 1,000,000 elements, by dtype")
    def time_step(self, dtype: str, phase: str) -> None:
        _step(10**6, phase, dtype)()


class Phases:
    """Ten steps, of which `average_every=10` averages one, in each phase; float32, one thread."""

    version = "2"
    timer = thread_clock
    params = (tuple(PHASES), (10**5, 10**7))
    param_names = ("phase", "elements")

    @titled("ten times ASGD.step(), by phase")
    def time_ten_steps(self, phase: str, elements: int) -> None:
        step = _step(elements, phase)
        for _ in range(10):
            step()


class Threads:
    """One float32 tensor, averaging, with one thread and with two."""

    version = "1"
    params = ((1, 2), (10**6, 10**7, 10**8))
    param_names = ("threads", "elements")

    @titled("ASGD.step() by number of threads")
    def time_step(self, threads: int, elements: int) -> None:
        _step(elements, "averaging", "float32", threads)()
