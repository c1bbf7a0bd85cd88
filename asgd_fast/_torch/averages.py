"""The averages of a torch optimizer put to use: in the place of their params, or copied elsewhere.

This module knows params and their state; it does not know how a step is made.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asgd_fast import _engines as update
from asgd_fast._torch.state import alias, extent, floats, is_alias
from asgd_fast._torch.internals import increment_versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from asgd_fast._torch.state import Entry, Group, State

__all__ = ["copy_to", "exchanged"]


class _Pair:
    """A param and its average, which trade places.

    Attributes
    ----------
    memory : Tensor
        The param's own, wherever the param itself may be put meanwhile.
    spare : Tensor or None
        Holds the param meanwhile; None where the memory of the average does.
    """

    def __init__(self, param: Tensor, entry: Entry) -> None:
        self.param, self.entry, self.ax = param, entry, entry["ax"]
        if self.ax.shape != param.shape:
            raise ValueError(
                f"state: 'ax' of shape {tuple(self.ax.shape)} does not match its param of shape "
                f"{tuple(param.shape)}"
            )
        self.memory = alias(param)
        self.spare = self.memory.clone() if self.ax.dtype != param.dtype else None
        self.for_engine = type(self.memory) is type(self.ax) is Tensor and update.are_fit(
            [(self.memory, self.spare, self.ax)]
        )

    def leave_to_torch(self) -> None:
        """Keep the param in spare memory, so that each half of the exchange can be repeated."""
        self.for_engine = False
        if self.spare is None:
            self.spare = self.memory.clone()

    def put_average(self) -> None:
        if not self.for_engine:
            self.param.detach().copy_(self.ax)
        elif self.spare is None:
            self.entry["ax"] = self.memory

    def put_back(self) -> None:
        if self.entry.get("ax") is self.memory:
            self.entry["ax"] = self.ax
        if not self.for_engine:
            assert self.spare is not None
            self.param.detach().copy_(self.spare)
        elif self.param.data_ptr() != self.memory.data_ptr():  # it was given other memory
            self.param.detach().copy_(self.memory)

    def written(self) -> list[Tensor]:
        """Return the tensors whose memory an engine writes, as far as autograd is concerned."""
        if not self.for_engine:
            return []
        return [self.memory] if self.spare is not None else [self.memory, self.ax]


@contextmanager
def exchanged(state: State, groups: Sequence[Group]) -> Iterator[tuple[Tensor, ...]]:
    """Hold the averages in the params for as long as the context lasts.

    What is to be averaged yet stays as it is. An average in its param's dtype trades places with
    it, and the state has the param's memory as the average; a wider one stays where it is, rounded
    into the param, which is kept in spare memory.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : list of dict
        The optimizer's param_groups.

    Yields
    ------
    tuple of Tensor
        The memory of params that the state has as averages.

    Raises
    ------
    ValueError
        An average has another shape than its param. Nothing is changed.
    """
    pairs = _pairs(state, groups)
    try:
        _touch(pairs)
        with update.exchanged(_for_engine(pairs)):
            _put_averages(pairs)
            yield tuple(pair.memory for pair in pairs)
    finally:
        try:
            _touch(pairs)
            _put_back(pairs)
        finally:
            _put_back(pairs)  # what an interrupt has left


@torch.no_grad()
def copy_to(
    state: State, groups: Sequence[Group], targets: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """Copy averages, or params that are to be averaged yet.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : list of dict
        The optimizer's param_groups.
    targets : iterable of (Tensor, Tensor)
        Each a param of the optimizer and where its average goes.
    """
    averages = {param: entry["ax"] for param, entry in _begun(state, groups)}
    for param, target in targets:
        target.copy_(averages.get(param, param))


def _begun(state: State, groups: Iterable[Group]) -> Iterator[tuple[Tensor, Entry]]:
    """Yield the params whose averages have begun, and have memory of their own."""
    params = chain.from_iterable(group["params"] for group in groups)
    stepped = [(param, state[param]) for param in params if state.get(param)]
    mus = floats([entry["mu"] for _, entry in stepped])
    for (param, entry), mu in zip(stepped, mus, strict=True):
        if mu != 1 and not is_alias(entry["ax"], param):
            yield param, entry


@torch.inference_mode(False)
@torch.no_grad()
def _pairs(state: State, groups: Iterable[Group]) -> list[_Pair]:
    """Find what is to be exchanged, and get all memory that it takes."""
    pairs = [_Pair(param, entry) for param, entry in _begun(state, groups)]
    others = [extent(pair.memory) for pair in pairs if not pair.for_engine]
    share_memory = not update.are_fit(_for_engine(pairs), others)
    for pair in pairs:
        if share_memory or not pair.for_engine:
            pair.leave_to_torch()
    return pairs


def _for_engine(pairs: Iterable[_Pair]) -> list[update.Exchange]:
    return [(pair.memory, pair.spare, pair.ax) for pair in pairs if pair.for_engine]


@torch.inference_mode(False)
@torch.no_grad()
def _put_averages(pairs: list[_Pair]) -> None:
    for pair in pairs:
        pair.put_average()


@torch.inference_mode(False)
@torch.no_grad()
def _put_back(pairs: list[_Pair]) -> None:
    while pairs:
        pairs[-1].put_back()
        pairs.pop()


def _touch(pairs: list[_Pair]) -> None:
    """Tell autograd that an engine changes the params."""
    written = chain.from_iterable(pair.written() for pair in pairs)
    increment_versions([tensor for tensor in written if not tensor.is_inference()])
