"""Steps and updates on a CUDA device, skipped where there is none.

Times are those of steps in a row, which the device works off one after the other: the clock waits
for it before the first and after the last. On commits without kernels of their own, the optimizer
leaves such tensors to torch.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib.util import find_spec
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING

import torch

from .beside import share
from .cases import TENSORS, optimizer_of, params_of, skip, skip_old, titled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PHASES = ("lazy", "averaging")
ELEMENTS = (10**6, 10**7, 10**8)


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def _waited(call: Callable[[], object]) -> Callable[[], None]:
    """Return a call that ends when the device is done."""

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait


@lru_cache(maxsize=1)
def _step(tensors: int | str, phase: str, dtype: str = "float32") -> Callable[[], object]:
    return _optimizer(params_of(tensors, getattr(torch, dtype), "cuda"), phase).step


def _optimizer(params: list[Tensor], phase: str) -> torch.optim.ASGD:
    _require_compiler()
    return optimizer_of(params, phase)


def _require_compiler() -> None:
    """Skip where kernels cannot be made."""
    if find_spec("numba_cuda") is None:
        skip("numba-cuda is not installed")


@lru_cache(maxsize=1)
def _update(elements: int, dtype: str) -> Callable[[], object]:
    from asgd_fast import asgd_

    (p,) = params_of(elements, getattr(torch, dtype), "cuda")
    _require_compiler()
    update = partial(asgd_, p.detach(), p.grad, p.detach().clone(), eta=0.01, mu=0.1)
    try:
        update()
    except ValueError as error:
        if "is not supported" not in str(error):
            raise
        skip_old(f"this commit does not take CUDA arrays: {error}")
    return update


class Sizes:
    """One float32 tensor of so many elements."""

    version = "1"
    timer = staticmethod(_clock)
    params = (ELEMENTS, PHASES)
    param_names = ("elements", "phase")

    @titled("ASGD.step() on the GPU, one tensor")
    def time_step(self, elements: int, phase: str) -> None:
        _step(elements, phase)()


class Tensors:
    """Many float32 tensors, or a tiny one."""

    version = "1"
    timer = staticmethod(_clock)
    params = (TENSORS, PHASES)
    param_names = ("tensors", "phase")

    @titled("ASGD.step() on the GPU, many tensors")
    def time_step(self, tensors: str, phase: str) -> None:
        _step(tensors, phase)()


class Dtypes:
    """``asgd_`` of ten million elements of each dtype, averaging."""

    version = "1"
    timer = staticmethod(_clock)
    params = (("float32", "float64", "float16", "bfloat16"),)
    param_names = ("dtype",)

    @titled("asgd_() on the GPU, by dtype")
    def time_asgd(self, dtype: str) -> None:
        _update(10**7, dtype)()


class TorchDefault:
    """Beside ``torch.optim.ASGD`` with its defaults, averaging; each step is waited for."""

    version = "1"
    unit = "of torch's time"
    params = ((10**7, *TENSORS[1:]),)
    param_names = ("tensors",)

    @titled("share of torch.optim.ASGD's time on the GPU")
    def track_share(self, tensors: int | str) -> float:
        params = params_of(tensors, device="cuda")
        own = _optimizer(params, "averaging")
        others = torch.optim.ASGD(params, t0=0)
        for _ in range(3):
            others.step()
        return share(_waited(own.step), _waited(others.step), perf_counter_ns)
