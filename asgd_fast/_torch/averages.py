"""The averages of a torch optimizer put to use: in the place of their params, or copied elsewhere.

This module knows params and their state; it does not know how a step is made.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asgd_fast import _engines
from asgd_fast._torch.conversions import extent
from asgd_fast._torch.internals import increment_versions
from asgd_fast._torch.scalars import floats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from asgd_fast._torch.state import ParamState

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

    def __init__(self, own: ParamState, ax: Tensor) -> None:
        param: Tensor = own.param
        self.param, self.own, self.ax = param, own, ax
        if self.ax.shape != param.shape:
            raise ValueError(
                f"state: 'ax' of shape {tuple(self.ax.shape)} does not match its param of shape "
                f"{tuple(param.shape)}"
            )
        self.memory = param.detach()
        self.spare = self.memory.clone() if self.ax.dtype != param.dtype else None
        self.for_engine = type(self.memory) is type(self.ax) is Tensor and _engines.are_fit(
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
            self.own.ax, self.own.source = None, self.memory

    def put_back(self) -> None:
        if self.own.source is self.memory:
            self.own.ax, self.own.source = self.ax, self.param
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
def exchanged(states: Sequence[ParamState]) -> Iterator[None]:
    """Hold the averages in the params for as long as the context lasts.

    Params whose averaging has not begun are left unchanged. An average in its param's dtype trades
    places with it, and the state then answers with what the param's memory holds; a wider one stays
    where it is, rounded into the param, which is kept in spare memory.

    Parameters
    ----------
    states : sequence of ParamState

    Raises
    ------
    ValueError
        An average has another shape than its param. Nothing is changed.
    """
    pairs = _pairs(states)
    try:
        _touch(pairs)
        with _engines.exchanged(_for_engine(pairs)):
            _put_averages(pairs)
            yield
    finally:
        try:
            _touch(pairs)
            _put_back(pairs)
        finally:
            _put_back(pairs)  # what an interrupt has left


@torch.no_grad()
def copy_to(states: Sequence[ParamState], targets: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy averages, or params whose averaging has not begun.

    Parameters
    ----------
    states : sequence of ParamState
    targets : iterable of (Tensor, Tensor)
        Each a param of the optimizer and where its average goes.
    """
    averages = {own.param: own.ax if own.ax is not None else own.source for own in _begun(states)}
    for param, target in targets:
        target.copy_(averages.get(param, param))


def _begun(states: Sequence[ParamState]) -> list[ParamState]:
    """Return the states of params whose averages have begun."""
    mus = floats([own.scalars()[2] for own in states])
    return [own for own, mu in zip(states, mus, strict=True) if mu != 1]


@torch.inference_mode(False)
@torch.no_grad()
def _pairs(states: Sequence[ParamState]) -> list[_Pair]:
    """Find what is to be exchanged, and get all memory that it takes."""
    pairs = [_Pair(own, own.ax) for own in _begun(states) if own.ax is not None]
    others = [extent(pair.memory) for pair in pairs if not pair.for_engine]
    share_memory = not _engines.are_fit(_for_engine(pairs), others)
    for pair in pairs:
        if share_memory or not pair.for_engine:
            pair.leave_to_torch()
    return pairs


def _for_engine(pairs: Iterable[_Pair]) -> list[_engines.Exchange]:
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
