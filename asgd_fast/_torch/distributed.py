"""DTensors laid out as others, and what is to be known of them on all ranks.

This module knows DTensors by what is the same on all ranks. So all decide alike whether a gradient
is redistributed; else some would wait for ever for what others do not send.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from asgd_fast._torch.memory import is_ordinary
from asgd_fast._torch.parts import are_alike, has_sums, is_dtensor

__all__ = ["check_layout", "has_memory", "laid_out_as", "redistributed"]


def has_memory(tensor: Any) -> bool:
    """Whether engines may know its memory: an ordinary tensor's, or that of a DTensor's part."""
    return is_ordinary(tensor) or (is_dtensor(tensor) and not has_sums(tensor))


def redistributed(grad: Any, param: Any, *, sums: bool) -> Tensor | None:
    """Return a gradient laid out as its param, of which all ranks have to send their parts.

    None if torch's operations have to do it: it is no DTensor of the same mesh, or one of sums, or
    the param is one of sums.

    Parameters
    ----------
    grad : Tensor
    param : Tensor
    sums : bool
        Whether it may be one whose elements are sums over the ranks.
    """
    if not (is_dtensor(grad) and is_dtensor(param)):
        return None
    if grad.device_mesh != param.device_mesh or has_sums(param) or (has_sums(grad) and not sums):
        return None
    with torch.no_grad():
        result: Tensor = grad.redistribute(placements=param.placements)
    return result


def _are_alike(tensor: Any, other: Any) -> bool:
    return is_dtensor(tensor) and is_dtensor(other) and are_alike(tensor, other)


def check_layout(name: str, tensor: Any, like: Any) -> None:
    """Refuse what `laid_out_as` cannot make.

    Raises
    ------
    TypeError
        One is a DTensor, and the other has neither all elements nor is it a DTensor that has them.
    """
    if not (is_dtensor(tensor) or is_dtensor(like)):
        return
    for each in (tensor, like):
        if is_dtensor(each) and has_sums(each) and not _are_alike(tensor, like):
            raise TypeError(f"{name}: a DTensor of placements {each.placements} is not supported")
        if not (is_dtensor(each) or is_ordinary(each)):
            raise TypeError(
                f"{name}: expected a torch.Tensor or a DTensor, got {type(each).__name__}"
            )


def laid_out_as(tensor: Any, like: Any) -> Tensor:
    """Return a tensor laid out over the ranks as another: all of them must call.

    Parameters
    ----------
    tensor, like : Tensor
        DTensors or not, of one shape.
    """
    whole: Tensor = tensor
    if is_dtensor(tensor) and not (is_dtensor(like) and tensor.device_mesh == like.device_mesh):
        whole = tensor.full_tensor()
    if not is_dtensor(like):
        return whole
    placed: Any = whole
    if not is_dtensor(whole):
        module = sys.modules["torch.distributed.tensor"]
        everywhere = [module.Replicate()] * like.device_mesh.ndim
        placed = module.DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    result: Tensor = placed.redistribute(placements=like.placements)
    return result
