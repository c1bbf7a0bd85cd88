"""The cases that benchmarks have in common: sizes, phases, and what is skipped where.

A case is named by plain strings and numbers, which asv shows as they stand.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from time import thread_time
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch._dynamo  # the first optimizer of each process would, and takes a second for it
from asv_runner.benchmarks.mark import SkipNotImplemented

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "ELEMENTS",
    "PHASES",
    "TENSORS",
    "optimizer_of",
    "params_of",
    "rounded",
    "skip",
    "skip_old",
    "thread_clock",
    "titled",
    "use_threads",
]

ELEMENTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)

TENSORS = ("1 of 64", "161 of ResNet-50", "1,000 of 64")

# The options that bring an optimizer into each phase.
PHASES: dict[str, dict[str, Any]] = {
    "lazy": {},
    "copy": {"lazy_average": False},
    "averaging": {"t0": 0},
    "wide averages": {"t0": 0, "average_dtype": torch.float64},
    "every 10th averaged": {"t0": 0, "average_every": 10},
}

# Before there were lazy averages, all were copies: without the option, as with it.
ALWAYS_COPIED = "lazy_average"

# In the environment where the commit is the one that the benchmarks were written for.
HAS_ALL = "ASGD_FAST_HAS_ALL"

# What cases of one thread are timed by: how long that thread had a processor. What else the machine
# does takes processors away, and makes a case wait, but does not count.
thread_clock = staticmethod(thread_time)

# What Linux says of its memory.
MEMORY = Path("/proc/meminfo")

Method = TypeVar("Method", bound="Callable[..., object]")


def titled(title: str) -> Callable[[Method], Method]:
    """Name a benchmark for people; asv's pages show it so.

    Parameters
    ----------
    title : str

    Returns
    -------
    callable
        A decorator, which puts nothing around the benchmark that would be timed.
    """

    def decorate(method: Method) -> Method:
        method.pretty_name = title  # type: ignore[attr-defined]
        return method

    return decorate


def skip(reason: str) -> NoReturn:
    """Skip a benchmark for which the machine has not what it takes.

    Parameters
    ----------
    reason : str
        ``asv run --show-stderr`` shows it.
    """
    print("skipped:", reason, file=sys.stderr)
    raise SkipNotImplemented(reason)


def skip_old(reason: str) -> NoReturn:
    """Skip a benchmark of what the commit does not have yet.

    Parameters
    ----------
    reason : str

    Raises
    ------
    RuntimeError
        The commit is to have all there is, as ``make bench-smoke`` says.
    """
    if HAS_ALL in os.environ:
        raise RuntimeError(f"skipped: {reason}")
    skip(reason)


def rounded(figure: float) -> float:
    """Return a figure with the five digits that its graph could show.

    Parameters
    ----------
    figure : float
    """
    return float(f"{figure:.5g}")


def use_threads(n: int) -> None:
    """Let torch, and what follows its number, use so many threads.

    Parameters
    ----------
    n : int
        Skips where there are fewer processors.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if available is not None and n > available:
        skip(f"needs {n} processors, there are {available}")
    torch.set_num_threads(n)


def sizes_of(tensors: int | str) -> list[int]:
    """Return the sizes of the tensors of a case.

    Parameters
    ----------
    tensors : int or str
        The elements of a single tensor, or one of `TENSORS`.

    Returns
    -------
    list of int
    """
    from models import resnet50

    if isinstance(tensors, int):
        return [tensors]
    return {"1 of 64": [64], "161 of ResNet-50": resnet50(), "1,000 of 64": [64] * 1000}[tensors]


def params_of(
    tensors: int | str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """Return params with gradients that stay.

    Parameters
    ----------
    tensors : int or str
        As for `sizes_of`.
    dtype : torch.dtype
    device : str
        Skips where there is none, or not the memory for params, gradients and wide averages.

    Returns
    -------
    list of Tensor
    """
    if device == "cuda" and not torch.cuda.is_available():
        skip("there is no CUDA device")
    sizes = sizes_of(tensors)
    needed = sum(sizes) * (3 * dtype.itemsize + 8)
    if device == "cpu" and needed > _free_memory():
        skip(f"needs {needed / 2**30:.1f} GiB of memory")
    torch.manual_seed(0)
    params: list[Tensor] = [torch.nn.Parameter(_numbers(n, dtype, device)) for n in sizes]
    for p in params:
        p.grad = _numbers(p.numel(), dtype, device)
    return params


def _numbers(n: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return numbers of a normal distribution, which repeat: to draw 100 million takes long."""
    block = torch.randn(min(n, 1 << 20)).to(dtype=dtype, device=device)
    return block.repeat(-(-n // block.numel()))[:n].clone()


def _free_memory() -> float:
    """Return how many bytes can be had, those that the system caches files in among them."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", MEMORY.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else float("inf")


def optimizer_of(params: list[Tensor], phase: str) -> torch.optim.ASGD:
    """Return an optimizer that has come into a phase.

    Parameters
    ----------
    params : list of Tensor
    phase : str
        One of `PHASES`; skips where this commit does not have it.

    Returns
    -------
    ASGD
    """
    if find_spec("asgd_fast.optim") is None:
        skip_old("this commit has no torch optimizer")
    from asgd_fast import ASGD

    options = dict(PHASES[phase])
    for option in options.keys() - inspect.signature(ASGD).parameters.keys():
        if option != ALWAYS_COPIED:
            skip_old(f"this commit has no option {option}")
        del options[option]
    optimizer = ASGD(params, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer
