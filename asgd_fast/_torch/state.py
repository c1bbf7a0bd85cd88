"""The state of a torch optimizer: how it is made, read by others, saved and loaded.

This module knows params, their states and checkpoints; it does not know how a step is made.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from asgd_fast._schedule import next_scalars
from asgd_fast._torch.groups import OWN_HYPERPARAMETERS, number
from asgd_fast._torch.memory import is_ordinary
from asgd_fast._torch.record import SCALARS, Record, scalar_tensor
from asgd_fast.cuda.scalars import DeviceScalars
from asgd_fast.threads import is_forked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, MutableMapping, Sequence

    from asgd_fast._torch.groups import Group

__all__ = [
    "SCALARS",
    "ParamState",
    "State",
    "average_as_param",
    "copied",
    "extent",
    "floats",
    "grad_as_param",
    "loaded",
    "new_average",
    "owners_of",
    "plain",
    "protected",
    "record_of",
    "release",
    "start",
    "states_of",
    "to_device",
    "to_host",
    "with_scalars",
]

State: TypeAlias = "MutableMapping[Tensor, Any]"

# The types of device that engines are for. AMD's GPUs too go by the name of "cuda".
DEVICES = ("cpu",) if torch.version.hip else ("cpu", "cuda")

# The dtypes that have a wider one.
_WIDENED = {torch.float16, torch.bfloat16, torch.float32, torch.complex32, torch.complex64}

# The t0 with which the first iterate of all is the first one in the average.
_T0_BEFORE_FIRST = -1.0


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
        return _copy_of(self.source, self.average_dtype)

    def complete(self) -> dict[str, Any]:
        """Return the entries as torch has them, an average among them, as a plain dict."""
        contents: dict[str, Any] = self.contents()
        if self.param is None or self.has_average or "ax" in contents or not contents:
            return contents
        others = {name: contents.pop(name) for name in list(contents) if name not in SCALARS}
        return {**contents, "ax": self.param_as_average(), **others}

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled as a dict that ``torch.load`` takes with ``weights_only``."""
        return OrderedDict, (self.contents(),)


def _opening(name: str) -> Any:
    """Return a method of dict that opens the state first."""
    method = getattr(dict, name)

    def opening(self: ParamState, *args: Any, **kwargs: Any) -> Any:
        self.open()
        return method(self, *args, **kwargs)

    opening.__name__ = name
    return opening


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__"),
    *("__ne__", "__or__", "__repr__", "__reversed__", "__ror__", "__setitem__", "clear", "copy"),
    *("get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"),
):
    setattr(ParamState, _name, _opening(_name))


def wide(param: Tensor, average_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a param's average: its own, or a wider one that was asked for."""
    if average_dtype is None or param.dtype not in _WIDENED:
        return param.dtype
    return torch.promote_types(param.dtype, average_dtype)


def owners_of(state: State) -> Counter[int]:
    """Return of how many params each entry is the state, by the ids of the entries."""
    return Counter(map(id, state.values()))


def record_of(
    state: State,
    param: Tensor,
    group: Group,
    *,
    owners: Counter[int] | None,
    lazy: bool,
    average_dtype: torch.dtype | None,
) -> ParamState:
    """Return the state of a param, new where there is none; it is not put into the optimizer's.

    The param's own is returned as it stands, inside `exchanged` too. What somebody else has put
    there is taken over with its tensors. An entry that is another param's too is returned as it is.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    param : Tensor
        With a gradient.
    group : dict
        The param's.
    owners : Counter of int, optional
        What `owners_of` returns; None for a param that has no state yet.
    lazy : bool
        Whether averages are to exist only once they begin.
    average_dtype : torch.dtype, optional
        As for `wide`.

    Raises
    ------
    TypeError, ValueError
        The group has hyperparameters of which no state can be made.
    RuntimeError
        A CUDA graph is being captured, of which making a state cannot be a part.
    """
    found: Any = state.get(param)
    if not found:
        return _created(param, group, lazy=lazy, average_dtype=average_dtype)
    is_known = type(found) is ParamState and found.param is not None
    if is_known and found.param is not param and state.get(found.param) is found:
        return cast("ParamState", found)
    if owners is not None and owners[id(found)] > 1:
        own = ParamState(found)
        own.has_average = True  # torch's function needs it
        return own
    if is_known and found.param is param:
        return cast("ParamState", found)
    return _adopted(param, found, lazy=lazy, average_dtype=average_dtype)


def _created(
    param: Tensor, group: Group, *, lazy: bool, average_dtype: torch.dtype | None
) -> ParamState:
    """Return the state of a param before its first step."""
    _refuse_capture(param)
    lr = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
    lr = number("lr", lr)
    eta, _ = next_scalars(1, lr, group["lambd"], group["alpha"], group["t0"])
    if lr < 0 and not isfinite(eta):
        raise ValueError(f"Invalid learning rate: {lr} (1 + lambd * lr * step must stay above 0)")
    dtype = scalar_dtype()
    started = group.get("averaging_started") and group["t0"] != _T0_BEFORE_FIRST
    own = ParamState.__new__(ParamState).seal(
        param,
        (0.0, scalar_tensor(lr, dtype).item(), 1.0),
        is_double=dtype == torch.float64,
        is_lazy=lazy and not _is_shared(param),
        average_dtype=wide(param, average_dtype),
        t0=_T0_BEFORE_FIRST if started else None,
    )
    if not is_ordinary(param) or param.device.type not in DEVICES or group["differentiable"]:
        for name in SCALARS:  # which torch's own function is to find where it makes them
            own[name] = own[name].to(param.device)
    return own


def states_of(
    state: State, groups: Iterable[Group], *, lazy: bool, average_dtype: torch.dtype | None
) -> list[ParamState]:
    """Return the states that there are, made the optimizer's own where somebody else's were put in.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : iterable of dict
        Some of its param_groups.
    lazy : bool
        Whether averages are to exist only once they begin.
    average_dtype : torch.dtype, optional
        As for `wide`.
    """
    owners = None
    states = []
    for group in groups:
        for param in group["params"]:
            found = state.get(param)
            # A look at a sealed one, if only whether it is empty, would open it.
            if type(found) is ParamState and found.param is param and (not found.is_open or found):
                states.append(found)
                continue
            if not found:
                continue
            owners = owners or owners_of(state)
            own = record_of(
                state, param, group, owners=owners, lazy=lazy, average_dtype=average_dtype
            )
            if own.param is param:
                state[param] = own
            else:  # another param's too
                dtype = wide(param, average_dtype)
                own = ParamState(own).bind(param, is_lazy=False, average_dtype=dtype)
            states.append(own)
    return states


def _adopted(
    param: Tensor, found: Any, *, lazy: bool, average_dtype: torch.dtype | None
) -> ParamState:
    """Return the state of a param that was somebody else's, with the same tensors."""
    own = found if type(found) is ParamState else ParamState(found)
    is_lazy = lazy and not _is_shared(param)
    dtype = own.average_dtype or wide(param, average_dtype)
    own.bind(param, is_lazy=is_lazy, average_dtype=dtype)
    if "mu" in own and float(own["mu"]) != 1:
        own.has_average = True
    return own


def loaded(
    state: State, groups: Iterable[Group], *, lazy: bool, average_dtype: torch.dtype | None
) -> defaultdict[Tensor, Any]:
    """Return a state that torch has loaded, or that was copied or unpickled, as an optimizer's own.

    Scalars and averages keep their precision, and averages get the dtype that they have in this
    optimizer. One that has not begun is given up: the next step would overwrite it. Tensors that
    are shared with other processes stay what they are.

    Parameters
    ----------
    state : dict of Tensor to dict
        It stays as it is.
    groups : iterable of dict
        The optimizer's param_groups. With capturable=True a GPU gets the scalars of its params, and
        all averages stay: the next step may be captured.
    lazy : bool
        Whether averages are to exist only once they begin.
    average_dtype : torch.dtype, optional
        As for `wide`.
    """
    result: defaultdict[Tensor, Any] = defaultdict(dict, state)
    capturable = {id(p) for group in groups if group.get("capturable") for p in group["params"]}
    for param, entry in state.items():
        if not (isinstance(param, Tensor) and isinstance(entry, dict)):
            continue
        is_capturable = id(param) in capturable and param.is_cuda
        ax = entry.get("ax")
        if isinstance(ax, Tensor) and (param.is_floating_point() or ax.dtype == param.dtype):
            entry = {**entry, "ax": ax.to(wide(param, average_dtype))}
        if not entry.keys() >= set(SCALARS):
            result[param] = entry
            continue
        is_shared = any(_is_shared(x) for x in entry.values() if isinstance(x, Tensor))
        others = entry.keys() - {*SCALARS, "ax", "t0"}
        if is_shared or others or not is_ordinary(param):
            result[param] = _adopted(param, entry, lazy=lazy, average_dtype=average_dtype)
            continue
        dtypes = [x.dtype for x in map(entry.get, SCALARS) if isinstance(x, Tensor)]
        own = ParamState.__new__(ParamState).seal(
            param,
            floats([entry[name] for name in SCALARS]),
            is_double=torch.float64 in dtypes or scalar_dtype() == torch.float64,
            is_lazy=lazy and not _is_shared(param),
            average_dtype=wide(param, average_dtype),
            t0=entry.get("t0"),
        )
        if "ax" in entry and (is_capturable or not own.is_lazy or own.scalars()[2] != 1):
            own.ax = entry["ax"]
        elif own.scalars()[2] != 1:
            own.has_average = True  # which is missing
        if is_capturable:
            to_device(own, param.device)
        result[param] = own
    return result


def protected(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of copies, a hook before torch loads it.

    Torch would share its tensors, and cast them to the dtype of their params. Hyperparameters that
    a checkpoint of torch does not have stay as they are.
    """
    state = {}
    with torch.inference_mode(False):  # which the copies are to outlive
        for key, entry in state_dict["state"].items():
            if isinstance(entry, dict):
                entry = {
                    name: _Kept(x.clone())
                    if isinstance(x, Tensor) and name in (*SCALARS, "ax")
                    else x
                    for name, x in entry.items()
                }
            state[key] = entry
    groups = state_dict["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        groups = [
            {**{name: own[name] for name in OWN_HYPERPARAMETERS}, **group}
            for own, group in zip(optimizer.param_groups, groups, strict=True)
        ]
    return {**state_dict, "state": state, "param_groups": groups}


class _Kept:
    """A tensor of the state that torch is not to convert while it loads the rest."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def release(state: State) -> None:
    """Put what `protected` kept from torch into the state that torch has loaded."""
    for param, entry in state.items():
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, _Kept):
                place = param.device if isinstance(param, Tensor) else value.tensor.device
                entry[name] = value.tensor.to(place)


def plain(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint in torch's form, a hook after torch has made it.

    Scalars and averages that nobody has seen yet are made as tensors for it.
    """
    state = {
        key: entry.complete() if isinstance(entry, ParamState) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def start(states: Sequence[ParamState], group: Group) -> None:
    """Make the next iterate of each param of a group the first one in its average.

    Params that have no state yet are averaged from their first iterate on.

    Parameters
    ----------
    states : sequence of ParamState
        Of the group.
    group : dict
        One of the optimizer's param_groups.
    """
    steps = floats([own.scalars()[0] for own in states])
    # The next one is number step + 1, and number t0 + 2 is the first.
    t0 = max(steps, default=0.0) - 1
    for own, step in zip(states, steps, strict=True):
        own.start = step - 1 if step - 1 != t0 else None
        own.begin_anew(step)
        if own.is_lazy and not group["capturable"]:  # a captured graph writes the average
            own.ax = None
    group["t0"] = t0
    group["averaging_started"] = True


def new_average(own: ParamState, *, copies: bool) -> Tensor:
    """Return memory for the average of a param, with the param in it if `copies`."""
    _refuse_capture(own.param)
    if copies:
        return own.param_as_average()
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(
            own.param, dtype=own.average_dtype, memory_format=torch.preserve_format
        ).detach()


@torch.no_grad()
def grad_as_param(grad: Tensor, param: Tensor) -> Tensor | None:
    """Return a gradient in its param's dtype and layout if that loses nothing, else None.

    For gradients that repeat their memory torch may round in another way, so they stay with it.
    """
    like = torch.empty_like(param)
    if (
        type(grad) is not Tensor
        or grad.layout != torch.strided
        or grad.device != param.device
        or grad.shape != param.shape
        or 0 in grad.stride()
        or grad.is_complex() != param.is_complex()
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
        type(ax) is not Tensor
        or ax.layout != torch.strided
        or ax.device != param.device
        or ax.shape != param.shape
        or ax.stride() == param.stride()
        or ax.is_complex() != param.is_complex()
        or ax.untyped_storage().nbytes() != ax.numel() * ax.itemsize  # part of something larger
    ):
        return None
    with _one_thread_if_forked():
        return torch.empty_like(param, dtype=ax.dtype).copy_(ax).detach()


def to_host(own: ParamState) -> None:
    """Read scalars from the GPU that had them; the host has them from now on."""
    _refuse_capture(own.param)
    own.move(None, tuple(floats(own.scalars())))


def to_device(own: ParamState, device: torch.device) -> DeviceScalars:
    """Let a GPU have the scalars from now on."""
    _refuse_capture(own.param)
    numbers = own.scalars()
    is_double = any(getattr(x, "dtype", None) == torch.float64 for x in numbers)
    dtype = torch.float64 if is_double else own.dtype
    scalars = DeviceScalars(floats(numbers), device, dtype)
    own.move(scalars)
    return scalars


def with_scalars(own: ParamState) -> None:
    """Replace what somebody has put in the place of the scalars by tensors of the host."""
    if own.missing():
        return
    dtypes = [getattr(own[name], "dtype", None) for name in SCALARS]
    dtype = torch.float64 if torch.float64 in dtypes else scalar_dtype()
    for name, value in zip(SCALARS, floats(own.scalars()), strict=True):
        own[name] = scalar_tensor(value, dtype)


def scalar_dtype() -> torch.dtype:
    """Return torch's dtype of scalars: float32 unless its default dtype is float64.

    Torch rounds them to a default dtype of half precision besides, which is not done here.
    """
    is_double = torch.get_default_dtype() is torch.float64
    return torch.float64 if is_double else torch.float32


def floats(scalars: Sequence[Any]) -> list[float]:
    """Return numbers, or what tensors of one element have; waits once for each device."""
    values = [0.0 if isinstance(x, Tensor) and x.is_cuda else float(x) for x in scalars]
    there: dict[torch.device, list[int]] = {}
    for i, x in enumerate(scalars):
        if isinstance(x, Tensor) and x.is_cuda:
            there.setdefault(x.device, []).append(i)
    for places in there.values():
        read = torch.stack([scalars[i].detach().reshape(()).double() for i in places]).tolist()
        for i, value in zip(places, read, strict=True):
            values[i] = value
    return values


def extent(tensor: Tensor | None) -> tuple[int, int]:
    """Return where the memory of a tensor begins and ends; (0, 0) if it has no address."""
    if tensor is None or tensor.device.type not in DEVICES or tensor.layout != torch.strided:
        return 0, 0
    if tensor.numel() == 0:
        return 0, 0
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a subclass that only wraps others
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _copy_of(param: Tensor, dtype: torch.dtype) -> Tensor:
    if is_forked() or torch.is_inference_mode_enabled():
        with torch.inference_mode(False), _one_thread_if_forked():  # as long as all the rest
            return _copied(param.detach(), dtype)
    return _copied(param.detach(), dtype)


def copied(param: Tensor, average_dtype: torch.dtype | None) -> Tensor:
    """Return a copy of a param in the dtype of its average, as for `wide`."""
    return _copy_of(param, wide(param, average_dtype))


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.clone() if tensor.dtype == dtype else tensor.to(dtype)


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


def _refuse_capture(param: Tensor) -> None:
    """Refuse to make or move state of a param on a GPU in the capture of a graph.

    Each replay would do it again.
    """
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "state: is made in the first step, and after hyperparameters such as capturable were "
            "changed, which cannot be part of a CUDA graph; make a step before the capture"
        )


def _is_shared(tensor: Tensor) -> bool:
    """Whether other processes may have the memory; torch says so of every GPU's."""
    return tensor.device.type == "cpu" and tensor.is_shared()
