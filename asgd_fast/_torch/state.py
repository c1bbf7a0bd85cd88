"""The state of a torch optimizer: made and loaded as torch has it, with the scalars packed.

This module knows params, their state and checkpoints; it does not know how a step is made.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from asgd_fast._schedule import next_scalars
from asgd_fast._torch.slots import Slot, Slots, check_group, number, same_kind
from asgd_fast.threads import is_forked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, MutableMapping, Sequence

__all__ = [
    "OWN_HYPERPARAMETERS",
    "SCALARS",
    "Entry",
    "Group",
    "State",
    "alias",
    "alone",
    "copied",
    "create",
    "extent",
    "find",
    "floats",
    "is_alias",
    "own",
    "put_back",
    "release",
    "rounds_scalars",
    "separated",
    "start",
    "strayed",
    "wide",
    "widen",
]

Group: TypeAlias = dict[str, Any]
Entry: TypeAlias = dict[str, Any]  # the state of one param
State: TypeAlias = "MutableMapping[Tensor, Entry]"

SCALARS = ("step", "eta", "mu")

# How many params share one tensor of scalars. Plain pickle saves the whole of it with each view, so
# it stays small; more would spare the step less than a nanosecond a param.
BLOCK = 64

# The hyperparameters that torch does not have, with the values that are its own way.
OWN_HYPERPARAMETERS = {"lr_schedule": "torch", "average_every": 1}


def create(
    state: State, groups: list[Group], *, lazy: bool, average_dtype: torch.dtype | None
) -> None:
    """Give state to every param that has a gradient and no state yet.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : list of dict
        The optimizer's param_groups.
    lazy : bool
        Whether averages are to have no memory of their own before the first step that averages.
    average_dtype : torch.dtype, optional
        As for `wide`.

    Raises
    ------
    RuntimeError
        A gradient is sparse. Nothing is created.
    TypeError, ValueError
        A group has hyperparameters that `check_group` refuses. Nothing is created.
    """
    for group in groups:
        check_group(group)
    stepped = []
    for group in groups:
        fresh = [
            param for param in group["params"] if param.grad is not None and not state.get(param)
        ]
        _refuse_capture(fresh)
        number("weight_decay", group["weight_decay"])
        lr = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
        if not fresh and isinstance(lr, Tensor) and lr.is_cuda:
            continue  # to read it would wait for the device
        lr = number("lr", lr)
        eta, _ = next_scalars(1, lr, group["lambd"], group["alpha"], group["t0"])
        if lr < 0 and not isfinite(eta):
            raise ValueError(
                f"Invalid learning rate: {lr} (1 + lambd * lr * step must stay above 0)"
            )
        stepped += [(param, lr, group) for param in group["params"] if param.grad is not None]
    if any(param.grad.is_sparse for param, _, _ in stepped):
        raise RuntimeError("ASGD does not support sparse gradients")
    for param, lr, group in stepped:
        if state.get(param):
            continue
        # Those of a GPU's params are the host's, which knows them then without waiting; or they are
        # packed on the device in the next moment.
        device = "cpu" if _is_of_engine(param, group) else param.device
        like: dict[str, Any] = {"dtype": _scalar_dtype(), "device": device}
        state[param].update(
            step=torch.zeros((), **like),
            eta=torch.full((), lr, **like),
            mu=torch.ones((), **like),
            ax=alias(param)
            if lazy and _may_be_lazy(param, group)
            else torch.zeros_like(
                param, dtype=wide(param, average_dtype), memory_format=torch.preserve_format
            ),
        )
        if group.get("averaging_started") and group["t0"] != _T0_BEFORE_FIRST:
            state[param]["t0"] = _T0_BEFORE_FIRST


def wide(param: Tensor, average_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a param's average: its own, or a wider one that was asked for.

    Parameters
    ----------
    param : Tensor
    average_dtype : torch.dtype, optional
        float32 or float64, or the complex type of such numbers for a complex param.

    Returns
    -------
    torch.dtype
    """
    if average_dtype is None or param.dtype not in _WIDENED:
        return param.dtype
    return torch.promote_types(param.dtype, average_dtype)


def widen(state: State, average_dtype: torch.dtype | None) -> None:
    """Put averages that have memory of their own into the dtype that was asked for.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    average_dtype : torch.dtype, optional
        As for `wide`.
    """
    for param, entry in state.items():
        ax = entry.get("ax") if isinstance(entry, dict) else None
        if not (isinstance(param, Tensor) and isinstance(ax, Tensor)) or is_alias(ax, param):
            continue
        if ax.dtype == param.dtype:
            entry["ax"] = ax.to(wide(param, average_dtype))


def start(state: State, group: Group, *, lazy: bool, average_dtype: torch.dtype | None) -> None:
    """Make the next iterate of each param of a group the first one in its average.

    Params that have no state yet are averaged from their first iterate on.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    group : dict
        One of the optimizer's param_groups.
    lazy : bool
        Whether averages are to give up their memory until then.
    average_dtype : torch.dtype, optional
        As for `wide`.
    """
    stepped = [(param, state[param]) for param in group["params"] if state.get(param)]
    steps = floats([entry["step"] for _, entry in stepped])
    # The next one is number step + 1, and number t0 + 2 is the first.
    t0 = max(steps, default=0.0) - 1
    for (param, entry), step in zip(stepped, steps, strict=True):
        entry.pop("t0", None)
        if step - 1 != t0:
            entry["t0"] = step - 1
        if isinstance(entry["mu"], Tensor):
            with torch.no_grad(), torch.inference_mode(False):
                entry["mu"].fill_(1)
        else:
            entry["mu"] = 1.0
        if lazy and _may_give_up(param, entry, group, average_dtype):
            entry["ax"] = alias(param)
    group["t0"] = t0
    group["averaging_started"] = True


def strayed(slots: Slots | None) -> list[Slot]:
    """Return those whose lazy average lies where the param was before it got other memory.

    Parameters
    ----------
    slots : Slots, optional

    Returns
    -------
    list of Slot
    """
    return [
        slot
        for slot in (chain(*slots.groups) if slots is not None else ())
        if slot is not None
        and slot.is_lazy
        and slot.average is slot.state.get("ax")
        and not is_alias(slot.average, slot.param)
    ]


def own(slots: Iterable[Slot], average_dtype: torch.dtype | None) -> None:
    """Give averages memory of their own, where their params are.

    Parameters
    ----------
    slots : iterable of Slot
        Those whose average may be lazy.
    average_dtype : torch.dtype, optional
        As for `wide`.

    Raises
    ------
    RuntimeError
        The memory runs out, or a CUDA graph is being captured. Nothing is changed.
    """
    lazy = [slot for slot in slots if is_alias(slot.state.get("ax"), slot.param) or slot.is_lazy]
    _refuse_capture(slot.param for slot in lazy)
    with torch.inference_mode(False):
        averages = [
            slot.state["ax"].to(slot.param.device, wide(slot.state["ax"], average_dtype), copy=True)
            for slot in lazy
        ]
    for slot, average in zip(lazy, averages, strict=True):
        slot.state["ax"] = average


def release(
    state: State,
    groups: list[Group],
    loaded: Iterable[Tensor],
    *,
    average_dtype: torch.dtype | None,
) -> None:
    """Give up the memory of averages that a step has made equal to their params.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : list of dict
        The optimizer's param_groups.
    loaded : iterable of Tensor
        The averages that may go; others belong to the user.
    average_dtype : torch.dtype, optional
        As for `wide`.
    """
    may_go = set(map(id, loaded))
    pairs = [
        (param, state[param])
        for group in groups
        for param in group["params"]
        if param.grad is not None
        and state.get(param)
        and id(state[param].get("ax")) in may_go
        and _may_give_up(param, state[param], group, average_dtype)
    ]
    mus = floats([entry["mu"] for _, entry in pairs])
    for (param, entry), mu in zip(pairs, mus, strict=True):
        if mu == 1 and torch.equal(entry["ax"], param.to(entry["ax"].dtype)):
            entry["ax"] = alias(param)


def separated(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose averages are copies where they were the params' own memory.

    A hook after torch has made the checkpoint.
    """
    # Some may lie where a param has been.
    slots = chain(*optimizer._slots.groups) if optimizer._slots is not None else ()
    known = {id(slot.average) for slot in slots if slot is not None and slot.is_lazy}
    known.update(map(id, optimizer._exchanged or ()))
    lazy = {
        id(entry)
        for param, entry in optimizer.state.items()
        if isinstance(param, Tensor)
        and (id(entry.get("ax")) in known or is_alias(entry.get("ax"), param))
    }
    state = {
        key: {**entry, "ax": entry["ax"].clone()} if id(entry) in lazy else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def find(
    state: State,
    groups: list[Group],
    before: Slots | None = None,
    *,
    average_dtype: torch.dtype | None,
    on_device: bool = False,
) -> Slots:
    """Find the state of each param, and pack the scalars that are not packed yet.

    Parameters
    ----------
    state : dict of Tensor to dict
        The optimizer's.
    groups : list of dict
        The optimizer's param_groups.
    before : Slots, optional
        What was found before; what is unchanged stays.
    average_dtype : torch.dtype, optional
        As for `wide`.
    on_device : bool
        Whether the scalars of a GPU's params are to be in its memory, as they are in groups with
        capturable=True.

    Returns
    -------
    Slots

    Raises
    ------
    RuntimeError
        There are some to be packed while a CUDA graph is being captured. Nothing is changed.
    """
    known = {}
    lazy: dict[int, Tensor] = {}
    if before is not None:
        before.mark_detached()
        slots = [slot for slot in chain(*before.groups) if slot is not None]
        known = {
            (id(slot.param), id(slot.state)): slot
            for group, own in zip(groups, before.groups, strict=False)
            for slot in own
            if slot is not None
            and slot.is_whole()
            and (not slot.packed or slot.on_device == _goes_on_device(slot.param, group, on_device))
            and slot.is_on_gpu == slot.param.is_cuda
        }
        lazy = {id(slot.average): slot.param for slot in slots if slot.is_lazy}
    params = set(chain.from_iterable(group["params"] for group in groups))
    owners = Counter(id(state.get(param)) for param in params)
    residents: dict[int, list[Tensor]] = {}
    for param in params:
        if address := _address(param):
            residents.setdefault(address, []).append(param)
    loose: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Entry]]] = {}
    unknown = [
        (param, state[param], group)
        for group in groups
        for param in group["params"]
        if state.get(param) and (id(param), id(state[param])) not in known
    ]
    packable = [
        owners[id(entry)] == 1 and _is_packable(param, entry, group)
        for param, entry, group in unknown
    ]
    _refuse_capture(param for (param, _, _), goes in zip(unknown, packable, strict=True) if goes)
    for (param, entry, group), goes in zip(unknown, packable, strict=True):
        ax: Any = entry.get("ax")
        owner = lazy.get(id(ax))
        is_own = owner is param
        at = residents.get(_address(ax), [])
        if is_own and same_kind(ax, param):
            entry["ax"] = alias(param)  # which may have other memory now
        elif owner is not None or (at and not any(param is other for other in at)):
            # Of a param that the state was taken from, or whose memory was: the step would write
            # over a param.
            place, like = (param.device, ax) if is_own else (ax.device, param)
            entry["ax"] = ax.to(place, wide(like, average_dtype), copy=True)
        if goes:
            device = param.device if _goes_on_device(param, group, on_device) else _HOST
            loose.setdefault((_dtype_for(entry), device), []).append((param, entry))
        else:
            known[id(param), id(entry)] = Slot(param, entry)
    for (dtype, device), pairs in loose.items():
        for start in range(0, len(pairs), BLOCK):
            for slot in _packed(pairs[start : start + BLOCK], dtype, device):
                known[id(slot.param), id(slot.state)] = slot
    found = [
        [known.get((id(param), id(state.get(param)))) for param in group["params"]]
        for group in groups
    ]
    return Slots(state, found, Tensor, torch.nn.Parameter, _eta_after, _version_of, _refer, alias)


def copied(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose tensors are copies, a hook before torch loads it.

    Torch would share them, and cast them to the dtype of their params. Hyperparameters that a
    checkpoint of torch does not have stay as they are.
    """
    state = {}
    with torch.inference_mode(False):  # which the copies are to outlive
        for key, entry in state_dict["state"].items():
            if isinstance(entry, dict):
                entry = {
                    name: value.clone() if isinstance(value, Tensor) else value
                    for name, value in entry.items()
                }
                for name in (*SCALARS, "ax"):
                    if isinstance(entry.get(name), Tensor):
                        entry[name] = _Kept(entry[name])
            state[key] = entry
    groups = state_dict["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        groups = [
            {**{name: own[name] for name in OWN_HYPERPARAMETERS}, **group}
            for own, group in zip(optimizer.param_groups, groups, strict=True)
        ]
    return {**state_dict, "state": state, "param_groups": groups}


def put_back(state: MutableMapping[Any, Any], average_dtype: torch.dtype | None) -> None:
    """Put what `copied` kept from torch into the state that torch has loaded.

    Scalars keep their dtype; averages get the one that they have in this optimizer.
    """
    for param, entry in state.items():
        for name, value in list(entry.items()) if isinstance(entry, dict) else ():
            if isinstance(value, _Kept):
                as_param = name == "ax" and isinstance(param, Tensor) and param.is_floating_point()
                entry[name] = value.on(param, wide(param, average_dtype) if as_param else None)


@contextmanager
def alone() -> Iterator[None]:
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


def rounds_scalars() -> bool:
    """Whether eta and mu are float32: torch keeps them so unless its default dtype is float64.

    Torch rounds them to a default dtype of half precision besides, which is not done here.
    """
    return torch.get_default_dtype() is not torch.float64


def floats(scalars: Sequence[Any]) -> list[float]:
    """Return numbers, or what tensors of one element have; waits once for each device.

    Parameters
    ----------
    scalars : sequence of float or Tensor

    Returns
    -------
    list of float
    """
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


_HOST = torch.device("cpu")

# The types of device that engines are for. AMD's GPUs too go by the name of "cuda".
_DEVICES = ("cpu",) if torch.version.hip else ("cpu", "cuda")

# The dtypes that have a wider one.
_WIDENED = {torch.float16, torch.bfloat16, torch.float32, torch.complex32, torch.complex64}

# The t0 with which the first iterate of all is the first one in the average.
_T0_BEFORE_FIRST = -1.0


class _Kept:
    """A tensor of the state that torch is not to convert while it loads the rest."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def on(self, param: Any, dtype: torch.dtype | None) -> Tensor:
        """Return it on the device of its param, if that is one of the optimizer's."""
        if not isinstance(param, Tensor):
            return self._tensor
        return self._tensor.to(device=param.device, dtype=dtype)


def _refuse_capture(params: Iterable[Tensor]) -> None:
    """Refuse to make or move state of params on a GPU in the capture of a graph.

    Each replay would do it again.
    """
    if any(param.is_cuda for param in params) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "state: is made in the first step, and after hyperparameters such as capturable were "
            "changed, which cannot be part of a CUDA graph; make a step before the capture"
        )


def _is_packable(param: Tensor, entry: Entry, group: Group) -> bool:
    """Whether an engine may advance the scalars: those of an ordinary tensor."""
    return (
        _is_of_engine(param, group)
        and type(entry) is dict
        and entry.keys() >= {*SCALARS, "ax"}
        # Shared with other processes, where the views are tensors of their own.
        and not any(isinstance(x, Tensor) and _is_shared(x) for x in map(entry.get, SCALARS))
    )


def _is_of_engine(param: Tensor, group: Group) -> bool:
    """Whether the param is an ordinary tensor of a known device, not left to torch by its group."""
    return (
        type(param) in (Tensor, torch.nn.Parameter)
        and param.device.type in _DEVICES
        and param.layout == torch.strided
        and not (param.is_neg() or param.is_conj())
        and not group["differentiable"]
        and (param.is_cuda or not group["capturable"])
    )


def _goes_on_device(param: Tensor, group: Group, on_device: bool) -> bool:
    return param.is_cuda and (on_device or group["capturable"])


def _is_shared(tensor: Tensor) -> bool:
    """Whether other processes may have the memory; torch says so of every GPU's."""
    return tensor.device.type == "cpu" and tensor.is_shared()


def _dtype_for(entry: Entry) -> torch.dtype:
    """Return what the scalars are packed in: torch's scalar dtype, or double if they are that."""
    double = any(getattr(entry[name], "dtype", None) == torch.float64 for name in SCALARS)
    return torch.float64 if double else _scalar_dtype()


def _packed(
    pairs: list[tuple[Tensor, Entry]], dtype: torch.dtype, device: torch.device
) -> Iterator[Slot]:
    """Move the scalars of some params into one tensor, of which they become views."""
    on_device = device.type != "cpu"
    values = floats([entry[name] for _, entry in pairs for name in SCALARS])
    # On a device the blocks of a launch count themselves in the last row.
    block = torch.tensor(values + [0.0] * (3 if on_device else 0), dtype=dtype).view(-1, 3)
    block = block.to(device)
    for place, (param, entry) in enumerate(pairs):
        packed = dict(zip(SCALARS, block[place].unbind(), strict=True), ax=entry["ax"])
        others = {name: value for name, value in entry.items() if name not in packed}
        entry.clear()
        entry.update(packed, **others)
        lazy_at = param.data_ptr() if is_alias(entry["ax"], param) else 0
        yield Slot(param, entry, block, place, lazy_at, on_device, values[3 * place])


def _may_be_lazy(param: Tensor, group: Group) -> bool:
    """Whether an engine takes the param as it is, at least with the gradients that most have."""
    return (
        _is_of_engine(param, group)
        and not group["capturable"]  # a graph's steps go on where no host sees them
        and (param.is_floating_point() or param.is_complex())
        and param.numel() != 0  # else there is no address to know it by
        and not _is_shared(param)  # with processes that would not see where the average moves
        and torch.empty_like(param, device="meta").stride() == param.stride()
    )


def _may_give_up(
    param: Tensor, entry: Entry, group: Group, average_dtype: torch.dtype | None
) -> bool:
    """Whether an average that has memory of its own may be lazy instead, and get its dtype back."""
    return (
        _may_be_lazy(param, group)
        and _is_packable(param, entry, group)
        and type(entry["ax"]) is Tensor
        and entry["ax"].device == param.device
        and entry["ax"].shape == param.shape
        and entry["ax"].dtype == wide(param, average_dtype)
    )


def is_alias(ax: Any, param: Tensor) -> bool:
    """Whether an average is the memory of its param."""
    return (
        type(ax) is Tensor
        and ax.device == param.device
        and ax.device.type in _DEVICES
        and ax.layout == param.layout == torch.strided
        and ax.numel() != 0
        and same_kind(ax, param)
        and ax.data_ptr() == param.data_ptr()
    )


def extent(tensor: Tensor | None) -> tuple[int, int]:
    """Return where the memory of a tensor begins and ends; (0, 0) if it has no address."""
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


def _address(tensor: Any) -> int:
    """Return where an ordinary tensor has its elements, else 0."""
    if (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type in _DEVICES
        and tensor.layout == torch.strided
        and tensor.numel() != 0
    ):
        return int(tensor.data_ptr())
    return 0


def alias(tensor: Tensor) -> Tensor:
    """Return another tensor of the same memory."""
    with torch.inference_mode(False):
        return tensor.detach()


def _version_of(tensor: Tensor) -> Tensor:
    """Return a tensor without memory that shares the version counter of another."""
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        if tensor.is_inference():  # has none
            return empty
        version = tensor.detach()
        version.data = empty
        return version


def _refer(tensor: Tensor) -> Tensor:
    """Return a tensor without memory of its own that has another as its gradient."""
    holder = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    holder.grad = tensor
    return holder


def _scalar_dtype() -> torch.dtype:
    return torch.float32 if rounds_scalars() else torch.float64


def _eta_after(lr: Tensor, lambd: float, alpha: float, step: float) -> float:
    """Return eta where lr is a tensor: torch then computes it in the dtype of lr."""
    lr = lr.detach().squeeze()
    return float(lr / ((1 + lambd * lr * step) ** alpha))
