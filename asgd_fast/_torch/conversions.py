"""Tensors in another dtype or layout, and where their memory is. This module knows no optimizer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast._torch.distributed import has_memory
from asgd_fast._torch.parts import part_of
from asgd_fast.threads import is_forked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# The types of device that engines are for. AMD's GPUs too go by the name of "cuda".
_DEVICES = ("cpu",) if torch.version.hip else ("cpu", "cuda")


def has_engine(param: Tensor) -> bool:
    """Whether an engine may take a param, as far as its type and device say."""
    return has_memory(param) and param.device.type in _DEVICES


def is_shared(tensor: Tensor) -> bool:
    """Whether other processes may have the memory; torch says so of every GPU's."""
    return tensor.device.type == "cpu" and tensor.is_shared()


@torch.no_grad()
def grad_as_param(grad: Tensor, param: Tensor) -> Tensor | None:
    """Return a gradient in its param's dtype and layout if that loses nothing, else None.

    For gradients that repeat their memory torch may round in another way, so they stay with it.
    """
    like = torch.empty_like(param)
    if (
        not _goes_with(grad, param)
        or 0 in grad.stride()
        or torch.promote_types(grad.dtype, param.dtype) != param.dtype
        or like.stride() != param.stride()
    ):
        return None
    with _one_thread_if_forked():
        return like.copy_(grad)


@torch.no_grad()
def average_as_param(ax: Any, param: Tensor) -> Tensor | None:
    """Return an average in the layout that its param has taken on, else None."""
    if (
        not _goes_with(ax, param)
        or ax.stride() == param.stride()
        or ax.untyped_storage().nbytes() != ax.numel() * ax.itemsize  # part of something larger
    ):
        return None
    with _one_thread_if_forked():
        return torch.empty_like(param, dtype=ax.dtype).copy_(ax).detach()


def _goes_with(tensor: Any, param: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and tensor.device == param.device
        and tensor.shape == param.shape
        and tensor.is_complex() == param.is_complex()
    )


def copy_as(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a param in some dtype, in its layout."""
    if torch.is_inference_mode_enabled() or is_forked():
        with ordinary_tensors():  # as long as all the rest
            return clone_as(param, dtype)
    return clone_as(param.detach(), dtype)


def clone_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor in some dtype, in its layout; with the graph that it has."""
    return tensor.clone() if tensor.dtype == dtype else tensor.to(dtype)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Let tensors that outlive a mode or a graph be made, in a forked process too.

    A generator, which an interrupt finds inside of its contexts, so that it leaves them.
    """
    with torch.inference_mode(False), torch.no_grad(), _one_thread_if_forked():
        yield


def extent(tensor: Tensor | None) -> tuple[int, int]:
    """Return where the memory of a tensor begins and ends; (0, 0) if it has no address.

    Of a DTensor it is the memory of this rank's part.
    """
    part = part_of(tensor)
    tensor = tensor if part is None else part
    if tensor is None or tensor.device.type not in _DEVICES or tensor.layout != torch.strided:
        return 0, 0
    if tensor.numel() == 0:
        return 0, 0
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a subclass that only wraps others
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether torch adds a tensor of one shape to one of the other, in place."""
    try:
        return bool(torch.broadcast_shapes(shape, to) == torch.Size(to))
    except RuntimeError:
        return False


@contextmanager
def _one_thread_if_forked() -> Iterator[None]:
    """Let torch do without other threads in a forked process, which would wait for them forever."""
    if not is_forked():
        yield
        return
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)
