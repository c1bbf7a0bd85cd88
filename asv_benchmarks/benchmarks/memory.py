"""The memory of training steps, and that of the optimizer's state."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from .cases import optimizer_of, params_of, rounded, skip, titled, use_threads

if TYPE_CHECKING:
    from torch import Tensor

PHASES = ("lazy", "copy", "averaging", "wide averages")

MODEL = "161 of ResNet-50"


class TrainingStep:
    """Three steps of the tensors of ResNet-50: params, gradients, and the optimizer's state.

    Beyond what the process had held before: what torch's libraries take differs by a tenth of all
    this from one environment to the next.
    """

    version = "1"
    unit = "bytes"
    params = (PHASES,)
    param_names = ("phase",)

    @titled("peak memory of training 98 MiB of params")
    def track_training_step(self, phase: str) -> float:
        use_threads(1)
        _train("1 of 64", phase)
        before = _peak()
        _train(MODEL, phase)
        return rounded(_peak() - before)


class State:
    """What the state of the tensors of ResNet-50 holds beside the params themselves."""

    version = "1"
    unit = "bytes per element"
    params = (PHASES,)
    param_names = ("phase",)

    @titled("memory of the optimizer's state")
    def track_state(self, phase: str) -> float:
        params = params_of(MODEL)
        optimizer = optimizer_of(params, phase)
        own = {_storage(p)[0] for p in params}
        found = dict(
            _storage(x)
            for entry in optimizer.state.values()
            for x in entry.values()
            if isinstance(x, torch.Tensor)
        )
        held = sum(size for address, size in found.items() if address not in own)
        return rounded(held / sum(p.numel() for p in params))


def _train(tensors: str, phase: str) -> None:
    """Make three steps with gradients of their own."""
    params = params_of(tensors)
    optimizer = optimizer_of(params, phase)
    for _ in range(3):
        for p in params:
            p.grad = None
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        loss.backward()
        optimizer.step()


def _peak() -> int:
    """Return the most bytes that this process has held; skips on Windows."""
    if find_spec("resource") is None:
        skip("the system does not say how much memory a process has held")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _storage(x: Tensor) -> tuple[int, int]:
    """Return the address and the bytes of the memory that a tensor is a view of."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
