"""step, eta and mu as numbers and as tensors, with the host or on a GPU.

This module knows the scalars of states; it does not know what they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast._torch.record import scalar_tensor
from asgd_fast.cuda.scalars import DeviceScalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asgd_fast._torch.record import Record


def scalar_dtype() -> torch.dtype:
    """Return float64 if that is torch's default dtype, else float32, of half types too."""
    is_double = torch.get_default_dtype() is torch.float64
    return torch.float64 if is_double else torch.float32


def floats(scalars: Sequence[Any]) -> list[float]:
    """Return numbers, or what tensors of one element have; waits once for each device."""
    values = list(scalars)
    there: dict[torch.device, list[int]] = {}
    for i, x in enumerate(scalars):
        if type(x) is float:
            continue
        if isinstance(x, Tensor) and x.is_cuda:
            there.setdefault(x.device, []).append(i)
        else:
            values[i] = float(x)
    for places in there.values():
        read = torch.stack([scalars[i].detach().reshape(()).double() for i in places]).tolist()
        for i, value in zip(places, read, strict=True):
            values[i] = value
    return values


def to_host(record: Record) -> None:
    """Read scalars from the GPU that had them; the host has them from now on."""
    refuse_capture(record.param)
    record.move(None, tuple(floats(record.scalars())))


def to_device(record: Record, device: torch.device) -> DeviceScalars:
    """Let a GPU have the scalars from now on."""
    refuse_capture(record.param)
    numbers = record.scalars()
    is_double = any(getattr(x, "dtype", None) == torch.float64 for x in numbers)
    dtype = torch.float64 if is_double else record.dtype
    scalars = DeviceScalars(floats(numbers), device, dtype)
    record.move(scalars)
    return scalars


def on_host(record: Record) -> list[Tensor]:
    """Return the scalars of a state, whatever stands in their place, as new tensors of the host."""
    scalars = record.scalars()
    dtypes = [getattr(scalar, "dtype", None) for scalar in scalars]
    dtype = torch.float64 if torch.float64 in dtypes else scalar_dtype()
    return [scalar_tensor(value, dtype) for value in floats(scalars)]


def refuse_capture(param: Tensor) -> None:
    """Refuse to make or move state of a param on a GPU in the capture of a graph.

    Each replay would do it again.
    """
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "state: is made in the first step, and after hyperparameters such as capturable were "
            "changed, which cannot be part of a CUDA graph; make a step before the capture"
        )
