"""The averages of a torch optimizer put to use: in the place of their params, or copied elsewhere.

This module knows params and their state; it does not know how a step is made.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast import _engines
from asgd_fast._torch.conversions import extent
from asgd_fast._torch.distributed import check_layout, laid_out_as
from asgd_fast._torch.internals import forget_copies, increment_versions
from asgd_fast._torch.parts import part_of
from asgd_fast._torch.scalars import floats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from asgd_fast._torch.state import ParamState

__all__ = ["average_of", "begun", "copy_to", "exchanged", "params_named", "shipped"]

# What wrappers put into the names of the params of the models in them: the last one of these may
# be the name of a user's module, too.
_WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_PREFIXES = [re.compile(rf"(?<![^.])({names})\.") for names in (_WRAPPERS, _WRAPPERS + "|module")]


class _Pair:
    """A param and its average, which trade places.

    Attributes
    ----------
    memory : Tensor
        The param's own, wherever the param itself may be put meanwhile.
    spare : Tensor or None
        Holds the param meanwhile; None where the memory of the average does.
    parts : (Tensor, Tensor or None, Tensor) or None
        The memory, the spare memory and the average for an engine, of DTensors those of this rank;
        None where no engine takes them.
    for_engine : bool
        Whether the engine makes the exchange, rather than torch.
    """

    __slots__ = ("ax", "for_engine", "memory", "own", "param", "parts", "spare")

    def __init__(self, own: ParamState, ax: Tensor) -> None:
        param: Tensor = own.param
        self.param, self.own, self.ax = param, own, ax
        self.memory = param.detach()
        self.spare = self.memory.clone() if ax.dtype != param.dtype else None
        self.parts = _parts(self.memory, self.spare, ax)
        self.for_engine = self.parts is not None

    def leave_to_torch(self) -> None:
        """Keep the param in spare memory, so that each half of the exchange can be repeated."""
        if self.ax.shape != self.param.shape:
            raise ValueError(
                f"state: 'ax' of shape {tuple(self.ax.shape)} does not match its param of shape "
                f"{tuple(self.param.shape)}"
            )
        if self.spare is None:
            self.spare = self.memory.clone()

    def put_average(self) -> None:
        """Let the param and the state show the exchange; torch's part of it is made here."""
        if not self.for_engine:
            self.param.detach().copy_(self.ax)
        elif self.spare is None:
            self.own.ax, self.own.source = None, self.memory

    def put_back(self) -> None:
        """Let the param and the state be as before; may be repeated."""
        if self.own.source is self.memory:
            self.own.ax, self.own.source = self.ax, self.param
        if not self.for_engine:
            assert self.spare is not None
            self.param.detach().copy_(self.spare)
        elif extent(self.param.detach())[0] != extent(self.memory)[0]:  # it was given other memory
            self.param.detach().copy_(self.memory)


@contextmanager
def exchanged(states: Sequence[ParamState]) -> Iterator[None]:
    """Hold the averages in the params for as long as the context lasts.

    An average in its param's dtype trades places with it, and the state then answers with what the
    param's memory holds; a wider one stays where it is, rounded into the param, which is kept in
    spare memory.

    Parameters
    ----------
    states : sequence of ParamState
        Of params whose averages have begun.

    Raises
    ------
    ValueError
        An average has another shape than its param. Nothing is changed.
    """
    pairs = _pairs(states)
    exchanges = _for_engine(pairs)
    written = _written(pairs)
    try:
        forget_copies()
        increment_versions(written)
        with _engines.exchanged(exchanges):
            _put_averages(pairs)
            yield
    finally:
        try:
            increment_versions(written)
            _put_back(pairs)
        finally:
            _put_back(pairs)  # what an interrupt has left
            forget_copies()


@torch.no_grad()
def copy_to(states: Sequence[ParamState], targets: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy averages, or params whose averaging has not begun.

    Parameters
    ----------
    states : sequence of ParamState
        Of params whose averages have begun.
    targets : iterable of (Tensor, Tensor)
        Each a param of the optimizer and where its average goes. All ranks of DTensors must call.

    Raises
    ------
    TypeError
        As `check_layout`. Nothing is changed.
    """
    averages = {own.param: own.ax if own.ax is not None else own.source for own in states}
    pairs = [(averages.get(param, param), target) for param, target in targets]
    for i, (average, target) in enumerate(pairs):
        check_layout(f"target: tensor {i}", average, target)
    for average, target in pairs:
        target.copy_(laid_out_as(average, target))


def begun(states: Sequence[ParamState]) -> list[ParamState]:
    """Return the states of params whose averages have begun."""
    mus = floats([own.scalars()[2] for own in states])
    return [own for own, mu in zip(states, mus, strict=True) if mu != 1]


def average_of(own: ParamState) -> Tensor:
    """Return the average of a param, wherever it stands, or before it begins a copy of the param.

    Somebody may keep it, so the state must know that it was shown.
    """
    source: Tensor = own.source
    if source is not own.param:  # it stands in the param
        return source
    ax: Tensor | None = own.contents().get("ax")
    return own.param_as_average() if ax is None else ax


def params_named(model: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Return the parameters of a model by their names, with or without those of wrappers.

    Raises
    ------
    ValueError
        The model has no parameters of some of the names.
    """
    by_name: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in by_name]
    if not missing:
        return [by_name[name] for name in names]
    for prefixes in _PREFIXES:
        plain = {prefixes.sub("", name): param for name, param in by_name.items()}
        wanted = [prefixes.sub("", name) for name in names]
        are_one_to_one = len(plain) == len(by_name) and len(set(wanted)) == len(set(names))
        if are_one_to_one and plain.keys() >= set(wanted):
            return [plain[name] for name in wanted]
    raise ValueError(f"target: has no parameters named {missing}")


def shipped(model: torch.nn.Module) -> dict[str, Any]:
    """Return a copy of the state dict of a model, by the names that it has without wrappers."""
    state_dict: dict[str, Any] = deepcopy(model.state_dict())
    prefixes = []  # each of a wrapper and of the model in it
    for path, module in model.named_modules(remove_duplicate=False):
        own = path + "." if path else ""
        if "_orig_mod" in module._modules:  # of torch.compile
            prefixes.append((own + "_orig_mod.", own))
        elif isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            prefixes.append((own + "module.", own))
    if not prefixes:
        return state_dict

    def plain(name: str) -> str:
        for long, short in reversed(prefixes):  # the inner ones first
            if name.startswith(long):
                name = short + name[len(long) :]
        return name

    renamed = type(state_dict)((plain(name), value) for name, value in state_dict.items())
    if hasattr(state_dict, "_metadata"):  # of each module
        renamed._metadata = {  # type: ignore[attr-defined]
            plain(path + ".")[:-1]: version for path, version in state_dict._metadata.items()
        }
    return renamed


@torch.inference_mode(False)
@torch.no_grad()
def _pairs(states: Sequence[ParamState]) -> list[_Pair]:
    """Return what is to be exchanged, with all the memory that the exchange takes."""
    pairs = [_Pair(own, own.ax) for own in states if own.ax is not None]
    if not _are_fit(pairs):
        for pair in pairs:
            pair.for_engine = pair.for_engine and _are_fit([pair])
        if not _are_fit(pairs):  # they share memory
            for pair in pairs:
                pair.for_engine = False
    for pair in pairs:
        if not pair.for_engine:
            pair.leave_to_torch()
    return pairs


def _are_fit(pairs: list[_Pair]) -> bool:
    """Whether the engine can exchange all pairs that are for it beside those that are for torch."""
    others = [extent(pair.memory) for pair in pairs if not pair.for_engine]
    return _engines.are_fit(_for_engine(pairs), others)


def _for_engine(pairs: list[_Pair]) -> list[_engines.Exchange]:
    return [pair.parts for pair in pairs if pair.for_engine and pair.parts is not None]


def _parts(memory: Tensor, spare: Tensor | None, ax: Tensor) -> _engines.Exchange | None:
    """Return the tensors that an engine would exchange, if it takes such."""
    if type(memory) is type(ax) is Tensor:
        return memory, spare, ax
    parts = part_of(memory), part_of(spare), part_of(ax, memory)
    return None if parts[0] is None or parts[2] is None else parts


def _written(pairs: list[_Pair]) -> list[Tensor]:
    """Return the tensors whose memory the engine writes, as far as autograd is concerned."""
    written = [pair.memory for pair in pairs if pair.for_engine]
    written += [pair.ax for pair in pairs if pair.for_engine and pair.spare is None]
    return [tensor for tensor in written if not tensor.is_inference()]


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
