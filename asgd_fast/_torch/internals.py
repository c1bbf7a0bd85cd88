"""The version counters by which autograd notices that a tensor was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.autograd.graph import increment_version

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["increment_versions"]


def increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that tensors have changed, so that it refuses a backward through old values."""
    if _IN_ONE_CALL:
        increment_version(tensors)
    else:
        for tensor in tensors:
            increment_version(tensor)


def _takes_lists() -> bool:
    try:
        increment_version([])
    except Exception:
        return False
    return True


# Since torch 2.5.
_IN_ONE_CALL = _takes_lists()
