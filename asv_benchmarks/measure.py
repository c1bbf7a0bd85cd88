"""Timing in turn, so that whatever else the machine does falls on all contenders alike."""

from __future__ import annotations

import gc
from pathlib import Path
from statistics import median
from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = [
    "LAST_CACHE",
    "Times",
    "after_backward",
    "from_memory",
    "in_turn",
    "pass_backward",
    "ratio",
    "typical",
]

# The nanoseconds of one call in each round, for each contender.
Times: TypeAlias = "dict[str, list[float]]"

# So many nanoseconds of calls make one time, so that the clock and what came before do not matter.
ENOUGH = 5_000_000


def _last_cache() -> int:
    """Return the size of the last cache in bytes; 32 MiB where the system does not tell."""
    # Not by sysconf, which on some virtual machines tells the sum of many.
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        return int(size.strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 1 << 25


LAST_CACHE = _last_cache()

# In float32, at least twice as large as the last cache.
SCRATCH = torch.zeros(max(1 << 25, LAST_CACHE // 2))


def in_turn(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], int] = perf_counter_ns,
) -> Times:
    """Time each contender once in each round: many calls of it, after one that is not timed.

    Parameters
    ----------
    contenders : dict of str to callable
    rounds : int
    clock : callable
        Tells the time in nanoseconds.

    Returns
    -------
    dict of str to list of float
        The nanoseconds of one call, for each round.
    """
    calls = {}
    for name, call in contenders.items():
        quickest = min(_time_of(call, 1, clock) for _ in range(4))
        calls[name] = max(1, ENOUGH // max(1, quickest))

    def measure(name: str) -> float:
        contenders[name]()
        return _time_of(contenders[name], calls[name], clock) / calls[name]

    return _rounds(list(contenders), measure, rounds)


def from_memory(contenders: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Time each contender once in each round: a single call, when the caches hold something else.

    That is how an optimizer finds its arrays after a backward pass. The threads are awake.

    Parameters
    ----------
    contenders : dict of str to callable
    rounds : int

    Returns
    -------
    dict of str to list of float
        The nanoseconds of the call, for each round.
    """
    for call in contenders.values():
        call()

    def measure(name: str) -> float:
        SCRATCH.add_(1)
        return _time_of(contenders[name], 1)

    return _rounds(list(contenders), measure, rounds)


def after_backward(
    optimizers: dict[str, torch.optim.Optimizer], params: Sequence[Tensor], rounds: int
) -> Times:
    """Time one step of each optimizer in each round, as a training loop makes it.

    Each step is timed alone, after a backward pass, by how long this thread had a processor.

    Parameters
    ----------
    optimizers : dict of str to Optimizer
        All of the same params.
    params : sequence of Tensor
    rounds : int

    Returns
    -------
    dict of str to list of float
        The nanoseconds of the step, for each round.
    """
    for optimizer in optimizers.values():
        for _ in range(3):
            pass_backward(optimizer, params)
            optimizer.step()

    def measure(name: str) -> float:
        pass_backward(optimizers[name], params)
        return _time_of(optimizers[name].step, 1, thread_time_ns)

    return _rounds(list(optimizers), measure, rounds)


def pass_backward(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
    """Make new gradients, as a training loop does, and fill the caches with something else.

    Parameters
    ----------
    optimizer : Optimizer
        Its gradients are removed first.
    params : sequence of Tensor
        The loss is half the sum of their squares, so each gradient equals its param.
    """
    optimizer.zero_grad()
    loss = torch.stack([torch.dot(p, p) for p in params]).sum() / 2
    loss.backward()
    SCRATCH.add_(1)


def _rounds(names: list[str], measure: Callable[[str], float], rounds: int) -> Times:
    times: Times = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in names:
                times[name].append(measure(name))
    finally:
        gc.enable()
    return times


def _time_of(call: Callable[[], object], n: int, clock: Callable[[], int] = perf_counter_ns) -> int:
    start = clock()
    for _ in range(n):
        call()
    return clock() - start


def typical(times: Times, name: str) -> float:
    """Return the median time of a contender in nanoseconds."""
    return median(times[name])


def ratio(times: Times, name: str, other: str) -> float:
    """Return how many times as long as `other` a contender takes, the median over the rounds."""
    return median(a / b for a, b in zip(times[name], times[other], strict=True))
