"""The state of a torch optimizer: how each param gets its own, from whatever stands in its place.

This module knows params, groups and their states; it knows neither steps nor checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from asgd_fast._schedule import next_scalars
from asgd_fast._torch.conversions import copy_as, has_engine, is_shared, ordinary_tensors
from asgd_fast._torch.groups import number
from asgd_fast._torch.record import SCALARS, Record, scalar_tensor
from asgd_fast._torch.scalars import floats, refuse_capture, scalar_dtype, to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

    from asgd_fast._torch.groups import Group
    from asgd_fast._torch.settings import Settings

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
    """The state that is shown of a param without a step, whose first step makes another one.

    It has the entries with which that would begin now: its group may get another lr until then.
    """

    __slots__ = ("group", "settings")

    def __init__(self, record: ParamState, group: Group, settings: Settings) -> None:
        super().__init__(record)
        self.group = group
        self.settings = settings
        self.bind(record.param, is_lazy=record.is_lazy, average_dtype=record.average_dtype)

    def complete(self) -> dict[str, Any]:
        """Return the entries with which a step would begin now."""
        return new(self.param, {}, self.group, self.settings).complete()

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


def dtype_of_average(param: Tensor, settings: Settings) -> torch.dtype:
    """Return the dtype of a param's average: its own, or a wider one that was asked for."""
    if settings.average_dtype is None or param.dtype not in _WIDENED:
        return param.dtype
    return torch.promote_types(param.dtype, settings.average_dtype)


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
    """Return the state of a param, made of what was found in its place; the caller puts it there.

    Two params in whose places the same entries stand get one state, which then makes two steps, as
    in torch. So `adopted` keeps what became of entries, by their ids, for the params that follow.
    """
    if not has_steps(found):
        return new(param, found or {}, group, settings)
    is_known = type(found) is ParamState and found.param is not None
    if is_known and (found.param is param or state.get(found.param) is found):
        return cast("ParamState", found)
    record = adopted.get(id(found))
    if record is None:
        record = adopted[id(found)] = adopt(param, found, settings)
    else:
        record.has_average = True  # torch's function needs it
    return record


def new(param: Tensor, entry: Mapping[str, float], group: Group, settings: Settings) -> ParamState:
    """Return the state with which a param begins its first step; the entry may have its "t0".

    Raises
    ------
    TypeError, ValueError
        The group has hyperparameters of which no state can be made.
    RuntimeError
        A CUDA graph is being captured, of which making a state cannot be a part.
    """
    refuse_capture(param)
    record = _bound(param, entry, settings)
    dtype = scalar_dtype()
    eta = scalar_tensor(_first_eta(group), dtype).item()
    record.seal((0.0, eta, 1.0), is_double=dtype == torch.float64)
    if not has_engine(param) or group["differentiable"]:
        for name in SCALARS:  # which torch's own function is to find where it makes them
            record[name] = record[name].to(param.device)
    return record


def adopt(param: Tensor, entry: Mapping[str, Any], settings: Settings) -> ParamState:
    """Return a state with the entries of somebody who may still have them."""
    record = _bound(param, entry, settings)
    if "mu" in record and param.device.type != "meta" and float(record["mu"]) != 1:
        record.has_average = True
    return record


def take(param: Tensor, entry: Mapping[str, Any], group: Group, settings: Settings) -> ParamState:
    """Return a state with entries that nobody else has, sealed if it can be.

    An average that has not begun is given up: the next step would overwrite it.
    """
    record = _bound(param, entry, settings)
    if not _can_be_sealed(record):
        record = adopt(param, entry, settings)
        if record.has_average and record.ax is None:  # as the next step of a sealed one has it
            record.ax = record.param_as_average()
        return record
    dtypes = {scalar_dtype(), *(getattr(record[name], "dtype", None) for name in SCALARS)}
    record.seal(floats(record.scalars()), is_double=torch.float64 in dtypes)
    is_captured = bool(group.get("capturable")) and param.is_cuda
    if record.mu == 1 and record.is_lazy and not is_captured:
        record.ax = None
    if is_captured:
        to_device(record, param.device)
    return record


def _bound(param: Tensor, entry: Mapping[str, Any], settings: Settings) -> ParamState:
    is_lazy = settings.lazy_average and not is_shared(param)
    dtype = dtype_of_average(param, settings)
    return ParamState(entry).bind(param, is_lazy=is_lazy, average_dtype=dtype)


def _first_eta(group: Group) -> float:
    """Return eta before the first step of a param."""
    lr = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
    lr = number("lr", lr)
    eta, _ = next_scalars(1, lr, group["lambd"], group["alpha"], group["t0"])
    if lr < 0 and not isfinite(eta):
        raise ValueError(f"Invalid learning rate: {lr} (1 + lambd * lr * step must stay above 0)")
    return lr


def _can_be_sealed(record: ParamState) -> bool:
    """Whether a state holds what a sealed one can hold, in memory that no process shares."""
    return (
        has_engine(record.param)
        and {*SCALARS} <= record.keys() <= {*SCALARS, "ax", "t0"}
        and not any(is_shared(x) for x in record.values() if isinstance(x, Tensor))
    )


def states_of(state: State, groups: Iterable[Group], settings: Settings) -> list[ParamState]:
    """Return the states of some groups' params, adopted where somebody has put in others."""
    adopted: dict[int, ParamState] = {}
    records = []
    found_of = {id(param): found for param, found in state.items()}  # tensors hash in Python
    for group in groups:
        for param in group["params"]:
            found = found_of.get(id(param))
            if not has_steps(found):
                continue
            if type(found) is ParamState and found.param is param:
                records.append(found)
                continue
            record = find(state, param, found, group, settings, adopted)
            state[param] = record
            if record.param is not param:  # another param's too
                dtype = dtype_of_average(param, settings)
                record = ParamState(record).bind(param, is_lazy=False, average_dtype=dtype)
            records.append(record)
    return records


def put_unstepped(state: State, groups: Iterable[Group], settings: Settings) -> None:
    """Let params that have a gradient have a state without a step, for who asks for it."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                state[param] = Unstepped(new(param, {}, group, settings), group, settings)


def complete(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return all entries as torch has them, as plain dicts.

    Scalars and averages that nobody has seen yet are made as tensors for it.
    """
    with ordinary_tensors():
        return {
            key: entry.complete() if isinstance(entry, ParamState) else entry
            for key, entry in state.items()
        }


def most_steps(records: Sequence[ParamState]) -> float:
    """Return the greatest number of steps of some params, 0 of none."""
    return max(floats([record.scalars()[0] for record in records]), default=0.0)


def start(state: State, group: Group, records: Sequence[ParamState], most: float) -> None:
    """Make the next iterate of each param of a group the first one in its average.

    Params that have made no step yet are averaged from their first iterate on. `most` is the
    greatest number of steps of the group's params, on whatever rank.
    """
    steps = floats([record.scalars()[0] for record in records])
    t0 = most - 1  # the next one is number step + 1, and number t0 + 2 is the first
    for record, step in zip(records, steps, strict=True):
        record.own_t0 = step - 1 if step - 1 != t0 else None
        record.begin_anew(step)
        if record.is_lazy and not group["capturable"]:  # a captured graph writes the average
            record.ax = None
    group["t0"] = t0
    start_before_first(state, group)


def start_before_first(state: State, group: Group) -> None:
    """Let the averages of params that have made no step begin with their first iterate."""
    for param in group["params"]:
        if not has_steps(state.get(param)):
            state.pop(param, None)
            if group["t0"] != _BEFORE_FIRST:
                state[param] = {"t0": _BEFORE_FIRST}


def new_average(record: ParamState, *, copies: bool) -> Tensor:
    """Return memory for the average of a param, with the param in it if `copies`."""
    refuse_capture(record.param)
    if copies:
        return record.param_as_average()
    with ordinary_tensors():
        return torch.empty_like(
            record.param, dtype=record.average_dtype, memory_format=torch.preserve_format
        )
