"""Optimizers that have not the params of their model: each rank some, or other tensors.

torch's ZeroRedundancyOptimizer makes an optimizer on each rank for a part of the params, and sends
them to the others after each step. Such as DeepSpeed's put flat copies in the place of the params.
This module knows neither states nor averages.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from asgd_fast._torch.internals import increment_versions, redundancy_around, share_params

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from asgd_fast._torch.groups import Group

__all__ = ["Redundancy", "has_parameters"]


class Redundancy:
    """The ZeroRedundancyOptimizer that made an optimizer, if one did.

    All ranks must make each call, in the same order.
    """

    def __init__(self) -> None:
        around = redundancy_around()
        self._wrapper = None if around is None else weakref.ref(around)

    def wrapper(self) -> Any:
        """Return the ZeroRedundancyOptimizer, or None."""
        return None if self._wrapper is None else self._wrapper()

    def params(self, groups: Sequence[Group]) -> list[Tensor]:
        """Return the params of all ranks, or without a wrapper those of the optimizer's groups."""
        wrapper = self.wrapper()
        if wrapper is not None:
            groups = wrapper.param_groups
        return [param for group in groups for param in group["params"]]

    def share(self) -> None:
        """Let all ranks have the params as they stand on the rank that steps them."""
        wrapper = self.wrapper()
        if wrapper is not None:
            increment_versions(self.params(()))
            share_params(wrapper)

    @contextmanager
    def shared_again(self) -> Iterator[None]:
        """Let all ranks have them after what is inside, too."""
        try:
            yield
        finally:
            self.share()

    def check_target(self, target: Any) -> None:
        """Refuse a target of which this rank cannot write all.

        Raises
        ------
        RuntimeError
            There is a wrapper, and the target is not the model that has the params of all ranks.
        """
        if self.wrapper() is None:
            return
        found = target.parameters() if isinstance(target, torch.nn.Module) else ()
        if not {id(param) for param in found}.issuperset(map(id, self.params(()))):
            raise RuntimeError(
                "copy_averages_to: this rank of a ZeroRedundancyOptimizer has the averages of some "
                "params only; give it the model that is trained, or load "
                "averaged_state_dict(model) into the other one"
            )

    def greatest(self, numbers: Sequence[float]) -> list[float]:
        """Return the greatest of each number over the ranks."""
        wrapper = self.wrapper()
        if wrapper is None:
            return list(numbers)
        greatest = torch.tensor(numbers, dtype=torch.float64, device=wrapper.join_device)
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX, group=wrapper.join_process_group)
        found: list[float] = greatest.tolist()
        return found

    def set_t0(self, groups: Sequence[Group]) -> None:
        """Let the wrapper, which overwrites hyperparameters with its own, have the groups' t0."""
        wrapper = self.wrapper()
        if wrapper is not None:
            for theirs, ours in zip(wrapper.param_groups, groups, strict=True):
                theirs["t0"] = ours["t0"]


def has_parameters(params: Iterable[Tensor]) -> bool:
    """Whether there are parameters of a model among the params of an optimizer."""
    return any(isinstance(param, torch.nn.Parameter) for param in params)
