"""The state of a torch optimizer: how each param gets its own, from whatever stands in its place.

This module knows params, groups and their states; it knows neither steps nor checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from asgd_fast._schedule import next_scalars
from asgd_fast._torch.conversions import clone_as, copy_as, has_engine, is_shared, ordinary_tensors
from asgd_fast._torch.groups import number
from asgd_fast._torch.internals import is_watched
from asgd_fast._torch.record import SCALARS, Record, scalar_tensor
from asgd_fast._torch.scalars import floats, refuse_capture, scalar_dtype, to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

    from asgd_fast._torch.groups import Group
    from asgd_fast._torch.settings import Settings

__all__ = [
    "ParamState",
    "State",
    "adopt",
    "complete",
    "find",
    "has_steps",
    "most_steps",
    "new_average",
    "put_unstepped",
    "start",
    "start_before_first",
    "states_of",
    "wide",
]

State: TypeAlias = "MutableMapping[Tensor, Any]"

# The dtypes that have a wider one.
_WIDENED = {torch.float16, torch.bfloat16, torch.float32, torch.complex32, torch.complex64}

# The t0 with which the first iterate of all is the first one in the average.
_BEFORE_FIRST = -1.0


class ParamState(Record):
    """The state of one param, which opens as soon as somebody looks into it.

    Before averaging begins there is no entry "ax". Who asks for it gets a copy of the param, which
    an average equals until then. What it has besides the dict's own methods is the optimizer's.
    """

    __slots__ = ()

    def __missing__(self, name: str) -> Any:
        if not self.is_open:
            return self[name]
        if name == "ax" and self.param is not None and not self.has_average:
            return self.param_as_average()
        raise KeyError(name)

    def param_as_average(self) -> Tensor:
        """Return a copy of the param in the dtype of its average."""
        return copy_as(self.source, self.average_dtype)

    def complete(self, scalars: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """Return the entries as torch has them, an average among them, as a plain dict.

        To be called within `ordinary_tensors`.

        Parameters
        ----------
        scalars : sequence of Tensor, optional
            As for `contents`.
        """
        lacks_average = self.param is not None and not self.has_average
        if not lacks_average or (self.is_open and (not self or "ax" in self)):
            return self.contents(scalars)
        return self.contents(scalars, clone_as(self.source, self.average_dtype))

    def __iter__(self) -> Iterator[str]:
        """Go through the names that a checkpoint has: torch's tools load what is named here."""
        names = list(self.keys())
        if self.param is not None and names and "ax" not in names:
            names.append("ax")
        return iter(names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled as a dict that ``torch.load`` takes with ``weights_only``.

        An average that begins because somebody has set mu is in it.
        """
        if not self.is_open or float(self.get("mu", 1)) == 1:
            return OrderedDict, (self.contents(),)
        with ordinary_tensors():
            return OrderedDict, (self.complete(),)


class Unstepped(ParamState):
    """The state of a param that has made no step, for who asks for it; the step makes its own.

    Parameters
    ----------
    own : ParamState
        What the first step would begin with.
    group : dict
        The param's, whose lr may change until then.
    settings : Settings
        The optimizer's.
    """

    __slots__ = ("group", "settings")

    def __init__(self, own: ParamState, group: Group, settings: Settings) -> None:
        super().__init__(own)
        self.group = group
        self.settings = settings
        self.bind(own.param, is_lazy=own.is_lazy, average_dtype=own.average_dtype)

    def complete(self, scalars: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """Return the entries with which a step would begin now."""
        return adopt(self.param, {}, self.group, self.settings).complete()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave nothing to copies, whose first steps make their own."""
        return dict, ()


def _opening(name: str) -> Any:
    """Return a method of dict that opens the state first."""
    method = getattr(dict, name)

    def opening(self: ParamState, *args: Any, **kwargs: Any) -> Any:
        self.open()
        return method(self, *args, **kwargs)

    opening.__name__ = name
    return opening


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__len__"),
    *("__ne__", "__or__", "__repr__", "__reversed__", "__ror__", "__setitem__", "clear", "copy"),
    *("get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"),
):
    setattr(ParamState, _name, _opening(_name))


def wide(param: Tensor, average_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a param's average: its own, or a wider one that was asked for."""
    if average_dtype is None or param.dtype not in _WIDENED:
        return param.dtype
    return torch.promote_types(param.dtype, average_dtype)


def has_steps(found: Any) -> bool:
    """Whether what stands in the place of a param's state is more than where its average begins."""
    if type(found) is ParamState and not found.is_open:  # any question to the dict would open it
        return True
    return bool(found) and type(found) is not Unstepped and not found.keys() <= {"t0"}


def find(
    state: State,
    param: Tensor,
    found: Any,
    group: Group,
    settings: Settings,
    adopted: dict[int, ParamState],
) -> ParamState:
    """Return the state of a param, new where there is none; it is not put into the optimizer's.

    It is another param's where both have the same entries: with one dict for two, torch steps it
    twice.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    param : Tensor
    found : object
        What stands there in the place of its state.
    group : dict
        The param's.
    settings : Settings
        The optimizer's.
    adopted : dict of int to ParamState
        What became of somebody else's entries, by their ids, in the same call for other params.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `adopt`.
    """
    if not has_steps(found):
        return adopt(param, found or {}, group, settings)
    is_known = type(found) is ParamState and found.param is not None
    if is_known and (found.param is param or state.get(found.param) is found):
        return cast("ParamState", found)
    own = adopted.get(id(found))
    if own is None:
        own = adopt(param, found, group, settings)
        adopted[id(found)] = own
    else:
        own.has_average = True  # torch's function needs it
    return own


def adopt(
    param: Tensor,
    entry: Mapping[str, Any],
    group: Group,
    settings: Settings,
    *,
    is_own: bool = False,
) -> ParamState:
    """Return the state of a param, with the entries that are given.

    Parameters
    ----------
    param : Tensor
    entry : mapping of str to object
        Without step, eta and mu, these are those before the first step.
    group : dict
        The param's.
    settings : Settings
        The optimizer's.
    is_own : bool
        Whether nobody else has the tensors, so that the state may be sealed, and an average may be
        given up that has not begun: the next step would overwrite it.

    Raises
    ------
    TypeError, ValueError
        The group has hyperparameters of which no state can be made.
    RuntimeError
        A CUDA graph is being captured, of which making a state cannot be a part.
    """
    own = ParamState(entry)
    dtype = wide(param, settings.average_dtype)
    own.bind(param, is_lazy=settings.lazy_average and not is_shared(param), average_dtype=dtype)
    if not has_steps(entry):
        refuse_capture(param)
        dtype = scalar_dtype()
        eta = scalar_tensor(_first_eta(group), dtype).item()
        own.seal((0.0, eta, 1.0), is_double=dtype == torch.float64)
        if not has_engine(param) or group["differentiable"]:
            for name in SCALARS:  # which torch's own function is to find where it makes them
                own[name] = own[name].to(param.device)
        return own
    if is_own and _is_fit_to_seal(own):
        dtypes = {scalar_dtype(), *(getattr(own[name], "dtype", None) for name in SCALARS)}
        own.seal(floats(own.scalars()), is_double=torch.float64 in dtypes)
        is_captured = bool(group.get("capturable")) and param.is_cuda
        if own.mu == 1 and own.is_lazy and not is_captured:
            own.ax = None
        if is_captured:
            to_device(own, param.device)
    elif "mu" in own and param.device.type != "meta" and float(own["mu"]) != 1:
        own.has_average = True
    return own


def _first_eta(group: Group) -> float:
    """Return eta before the first step of a param."""
    lr = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
    lr = number("lr", lr)
    eta, _ = next_scalars(1, lr, group["lambd"], group["alpha"], group["t0"])
    if lr < 0 and not isfinite(eta):
        raise ValueError(f"Invalid learning rate: {lr} (1 + lambd * lr * step must stay above 0)")
    return lr


def _is_fit_to_seal(own: ParamState) -> bool:
    """Whether a state holds what a sealed one can hold, in memory that no process shares."""
    return (
        has_engine(own.param)
        and {*SCALARS} <= own.keys() <= {*SCALARS, "ax", "t0"}
        and not any(is_shared(x) for x in own.values() if isinstance(x, Tensor))
    )


def states_of(state: State, groups: Iterable[Group], settings: Settings) -> list[ParamState]:
    """Return the states that there are, made the optimizer's own where somebody else's were put in.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : iterable of dict
        Some of its param_groups.
    settings : Settings
        The optimizer's.
    """
    adopted: dict[int, ParamState] = {}
    states = []
    found_of = {id(param): found for param, found in state.items()}  # tensors hash in Python
    for group in groups:
        for param in group["params"]:
            found = found_of.get(id(param))
            if not has_steps(found):
                continue
            if type(found) is ParamState and found.param is param:
                states.append(found)
                continue
            own = find(state, param, found, group, settings, adopted)
            state[param] = own
            if own.param is not param:  # another param's too
                dtype = wide(param, settings.average_dtype)
                own = ParamState(own).bind(param, is_lazy=False, average_dtype=dtype)
            states.append(own)
    return states


def put_unstepped(state: State, groups: Iterable[Group], settings: Settings) -> None:
    """Let params that have a gradient have a state without a step, for who asks for it.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : iterable of dict
        The optimizer's param_groups.
    settings : Settings
        The optimizer's.
    """
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                own = adopt(param, {}, group, settings)
                state[param] = Unstepped(own, group, settings)


def complete(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return all entries as torch has them, as plain dicts.

    Scalars and averages that nobody has seen yet are made as tensors for it.
    """
    with ordinary_tensors():
        scalars = _scalars_of(
            [x for x in state.values() if type(x) is ParamState and x.has_numbers]
        )
        return {
            key: entry.complete(scalars.get(id(entry))) if isinstance(entry, ParamState) else entry
            for key, entry in state.items()
        }


def _scalars_of(records: Sequence[ParamState]) -> dict[int, list[Tensor]]:
    """Return step, eta and mu of states that have numbers as tensors, by the ids of the states.

    Each looks to torch as if it had memory of its own, since a pickled view of a tensor has all the
    memory of that with it. Views of an array take half the time of tensors made one by one, which
    remain to be made where each operation is watched.
    """
    if is_watched():
        return {}
    scalars = {}
    for dtype, numpy_dtype in ((torch.float32, np.float32), (torch.float64, np.float64)):
        alike = [record for record in records if record.dtype is dtype]
        block = np.array([record.scalars() for record in alike], numpy_dtype)
        for i, record in enumerate(alike):
            scalars[id(record)] = [torch.from_numpy(block[i, k, ...]) for k in range(len(SCALARS))]
    return scalars


def most_steps(states: Sequence[ParamState]) -> float:
    """Return the greatest number of steps of some params, 0 of none."""
    return max(floats([own.scalars()[0] for own in states]), default=0.0)


def start(state: State, group: Group, states: Sequence[ParamState], most: float) -> None:
    """Make the next iterate of each param of a group the first one in its average.

    Params that have made no step yet are averaged from their first iterate on.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    group : dict
        One of the optimizer's param_groups.
    states : sequence of ParamState
        Of the group.
    most : float
        The greatest number of steps of its params, on whatever rank.
    """
    steps = floats([own.scalars()[0] for own in states])
    t0 = most - 1  # the next one is number step + 1, and number t0 + 2 is the first
    for own, step in zip(states, steps, strict=True):
        own.own_t0 = step - 1 if step - 1 != t0 else None
        own.begin_anew(step)
        if own.is_lazy and not group["capturable"]:  # a captured graph writes the average
            own.ax = None
    group["t0"] = t0
    start_before_first(state, group)


def start_before_first(state: State, group: Group) -> None:
    """Let the averages of params that have made no step begin with their first iterate."""
    for param in group["params"]:
        if not has_steps(state.get(param)):
            state.pop(param, None)
            if group["t0"] != _BEFORE_FIRST:
                state[param] = {"t0": _BEFORE_FIRST}


def new_average(own: ParamState, *, copies: bool) -> Tensor:
    """Return memory for the average of a param, with the param in it if `copies`."""
    refuse_capture(own.param)
    if copies:
        return own.param_as_average()
    with ordinary_tensors():
        return torch.empty_like(
            own.param, dtype=own.average_dtype, memory_format=torch.preserve_format
        )
