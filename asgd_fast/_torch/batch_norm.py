"""The buffers of a model while averages stand in its params: kept, and the statistics updated.

This module knows models and batches of data; it does not know averages.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import swa_utils

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from torch.nn import Module

__all__ = ["check_model", "kept_buffers", "update_statistics"]


def check_model(model: Any, update_bn: Any) -> None:
    """Refuse what is no model, or data for the batch normalization of none.

    Raises
    ------
    TypeError
        `model` is neither a Module nor None, or None where there are data.
    """
    if not isinstance(model, torch.nn.Module) and (model is not None or update_bn is not None):
        expected = "a torch.nn.Module" + (", or None" if update_bn is None else " with update_bn")
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


@contextmanager
def kept_buffers(model: Module | None) -> Iterator[None]:
    """Give the buffers of a model their bits back on the way out, and their places to them.

    Parameters
    ----------
    model : Module or None
        Without one nothing is done.
    """
    kept = [] if model is None else _copied_buffers(model)
    try:
        yield
    finally:
        try:
            _put_back(kept)
        finally:
            _put_back(kept)  # what an interrupt has left


def update_statistics(model: Module, batches: Iterable[Any]) -> None:
    """Compute the running statistics of batch normalization anew: torch's ``update_bn``.

    Unlike that, it leaves every module in the mode, and with the momentum, in which it was, after
    an exception too, and takes the batches to the device of the model if that is on one device.

    Parameters
    ----------
    model : Module
    batches : iterable of Tensor, or of list or tuple
        As for ``torch.optim.swa_utils.update_bn``.
    """
    devices = {param.device for param in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(module, module.momentum) for module, _ in modes if hasattr(module, "momentum")]
    try:
        swa_utils.update_bn(batches, model, devices.pop() if len(devices) == 1 else None)
    finally:
        for module, training in modes:
            module.training = training
        for module, momentum in momenta:
            module.momentum = momentum


@torch.inference_mode(False)
@torch.no_grad()
def _copied_buffers(model: Module) -> list[tuple[Module, str, Tensor, Tensor]]:
    """Return each buffer of a model with its module, its name and a copy."""
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]


@torch.inference_mode(False)
@torch.no_grad()
def _put_back(kept: list[tuple[Module, str, Tensor, Tensor]]) -> None:
    while kept:
        module, name, buffer, copy = kept[-1]
        buffer.copy_(copy)
        if getattr(module, name) is not buffer:
            setattr(module, name, buffer)
        kept.pop()
