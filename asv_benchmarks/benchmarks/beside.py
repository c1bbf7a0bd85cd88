"""A step's time as a share of another's, timed in turn in one process: what slows both cancels.

Less is better, as everywhere in asv. One thread: two of them wait for each other where something
else takes a processor, by milliseconds on virtual machines, which no median outweighs.
"""

from __future__ import annotations

from time import thread_time_ns
from typing import TYPE_CHECKING

import torch

from .cases import TENSORS, optimizer_of, params_of, rounded, skip, titled, use_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# In each of them, every contender runs for 5 ms.
ROUNDS = 11


def share(
    own: Callable[[], object],
    other: Callable[[], object],
    clock: Callable[[], int] = thread_time_ns,
) -> float:
    """Return how many times as long as another call ours takes, the median over the rounds.

    Parameters
    ----------
    own, other : callable
    clock : callable
        Tells the time in nanoseconds; by default how long this thread had a processor.

    Returns
    -------
    float
    """
    from measure import in_turn, ratio

    times = in_turn({"own": own, "other": other}, ROUNDS, clock)
    return rounded(ratio(times, "own", "other"))


def _share_of_torchs(params: list[Tensor], phase: str) -> float:
    own = optimizer_of(params, phase).step
    others = torch.optim.ASGD(params, t0=0 if phase == "averaging" else 1e6)
    for _ in range(3):
        others.step()
    return share(own, others.step)


def _arrays_of(optimizer: torch.optim.ASGD) -> tuple[Tensor, Tensor, Tensor]:
    """Return its param, gradient and average for others too: some memory is faster than other."""
    (param,) = optimizer.param_groups[0]["params"]
    return param.detach(), param.grad, optimizer.state[param]["ax"]


class TorchDefault:
    """Beside ``torch.optim.ASGD`` with its defaults, which copies where ours is lazy."""

    version = "2"
    unit = "of torch's time"
    params = ((10**3, 10**5, 10**7), ("lazy", "averaging"))
    param_names = ("elements", "phase")

    @titled("share of torch.optim.ASGD's time: one tensor")
    def track_share(self, elements: int, phase: str) -> float:
        use_threads(1)
        return _share_of_torchs(params_of(elements), phase)


class TorchDefaultTensors:
    """Beside ``torch.optim.ASGD`` with its defaults, for many tensors."""

    version = "2"
    unit = "of torch's time"
    params = (TENSORS[1:], ("lazy", "averaging"))
    param_names = ("tensors", "phase")

    @titled("share of torch.optim.ASGD's time: many")
    def track_share(self, tensors: str, phase: str) -> float:
        use_threads(1)
        return _share_of_torchs(params_of(tensors), phase)


class TorchCompile:
    """Beside the update as torch.compile makes it of plain operations, averaging."""

    version = "2"
    timeout = 300
    unit = "of torch.compile's time"
    params = ((10**5, 10**7),)
    param_names = ("elements",)

    @titled("share of torch.compile's time: averaging")
    def track_share(self, elements: int) -> float:
        use_threads(1)
        optimizer = optimizer_of(params_of(elements), "averaging")
        param, grad, ax = _arrays_of(optimizer)
        eta, mu = torch.tensor(0.01), torch.tensor(0.1)

        def averaging() -> None:
            param.copy_(param * 0.9999 - eta * grad)
            ax.copy_(ax + (param - ax) * mu)

        call = torch.compile(averaging)
        try:
            call()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            skip(f"torch.compile failed: {error}")
        return share(optimizer.step, call)


class PlainLoop:
    """Beside a plain C loop of the same traffic: 1 is all of its bandwidth, 1.25 is 80 % of it."""

    version = "2"
    unit = "of a plain loop's time"
    params = ((10**5, 10**6, 10**7), ("lazy", "averaging"))
    param_names = ("elements", "phase")

    @titled("share of a plain C loop's time")
    def track_share(self, elements: int, phase: str) -> float:
        from plain import PlainLoops

        use_threads(1)
        optimizer = optimizer_of(params_of(elements), phase)
        loop = {"lazy": "stepping", "averaging": "averaging"}[phase]
        try:
            loops = PlainLoops(parallel=False)
        except FileNotFoundError as error:
            skip(f"no C compiler: {error}")
        return share(optimizer.step, loops.loop(loop, *_arrays_of(optimizer)))
