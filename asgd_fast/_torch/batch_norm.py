"""The buffers of a model while averages stand in its params: kept, and the statistics updated.

This module knows models and batches of data; it does not know averages.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import swa_utils

from asgd_fast._torch.internals import is_persistent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from torch.nn import Module


def check_model(model: Any, update_bn: Any) -> None:
    """Refuse a model that is neither a Module nor None, or None where there are data for it."""
    if not isinstance(model, torch.nn.Module) and (model is not None or update_bn is not None):
        expected = "a torch.nn.Module" + (", or None" if update_bn is None else " with update_bn")
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


@contextmanager
def kept_buffers(model: Module | None) -> Iterator[None]:
    """Give the buffers of a model, if there is one, their bits and their places back at the end.

    It raises RuntimeError if a buffer cannot be put back, as where a parameter stands in its place.
    All others are.
    """
    kept = [] if model is None else _copied_buffers(model)
    failures: list[RuntimeError] = []
    try:
        yield
    finally:
        try:
            _put_back(kept, failures)
        finally:
            _put_back(kept, failures)  # what an interrupt has left
            if failures:
                raise failures[0]


def update_statistics(model: Module, batches: Iterable[Any]) -> None:
    """Compute the running statistics of batch normalization anew: torch's ``update_bn``.

    Unlike that, it leaves every module in the mode, and with the momentum, in which it was, after
    an exception too, and takes the batches to the device of the model if that is on one device. As
    that, it runs the model in training mode, so that dropout draws torch's global random numbers.
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


class _Kept(NamedTuple):
    """A buffer of a model, and what is needed to put it back."""

    module: Module
    name: str
    is_persistent: bool
    buffer: Tensor
    shape: torch.Size
    copy: Tensor  # of what is in memory: see `_in_memory`

    def put_back(self) -> None:
        try:
            self._put_values_back()
        finally:
            if not hasattr(self.module, self.name):
                self.module.register_buffer(self.name, self.buffer, self.is_persistent)
            elif getattr(self.module, self.name) is not self.buffer:
                setattr(self.module, self.name, self.buffer)

    def _put_values_back(self) -> None:
        if self.buffer.shape != self.shape or self.buffer.dtype != self.copy.dtype:
            self.buffer.data = self.copy.expand(self.shape)
            return
        with torch.inference_mode(self.buffer.is_inference()):
            _in_memory(self.buffer).copy_(self.copy)


@torch.inference_mode(False)
@torch.no_grad()
def _copied_buffers(model: Module) -> list[_Kept]:
    """Return each buffer of a model with its module, its name and a copy."""
    return [
        _Kept(
            module,
            name,
            is_persistent(module, name),
            buffer,
            buffer.shape,
            _in_memory(buffer).clone(),
        )
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]


@torch.inference_mode(False)
@torch.no_grad()
def _put_back(kept: list[_Kept], failures: list[RuntimeError]) -> None:
    """Put each buffer back, the others too where one cannot be."""
    while kept:
        try:
            kept[-1].put_back()
        except Exception as error:
            failure = RuntimeError(
                f"averaged_parameters: cannot put buffer {kept[-1].name!r} of a "
                f"{type(kept[-1].module).__name__} back: {error}"
            )
            failure.__cause__ = error
            failures.append(failure)
        kept.pop()


def _in_memory(tensor: Tensor) -> Tensor:
    """Return what an expanded tensor repeats, which can be written; others as they are."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor
