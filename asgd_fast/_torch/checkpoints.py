"""Checkpoints of a torch optimizer: their form, which is torch's, and what is refused in them.

torch's tools load what is named in both optimizers, so a checkpoint has torch's keys alone. Where
`start` has begun averages at different step counts, the t0 of the group is marked in its last bits:
the t0 of each param is then step - 1 / mu, or mu has been replaced by it, and params that have no
state yet begin with their first iterate. To torch a marked t0 is as good as equal.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from math import inf, isclose, isfinite, ulp
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast._schedule import next_scalars
from asgd_fast._torch.conversions import broadcasts
from asgd_fast._torch.groups import (
    NUMBERS,
    OWN_HYPERPARAMETERS,
    SWITCHES,
    check_group,
    drop_usual,
    has_own_options,
    number,
)
from asgd_fast._torch.record import SCALARS, scalar_tensor
from asgd_fast._torch.scalars import floats, scalar_dtype
from asgd_fast._torch.state import complete, dtype_of_average, has_steps, start_before_first, take
from asgd_fast._warn import warn
from asgd_fast.schedule import check_averaging, check_scalar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asgd_fast._torch.groups import Group
    from asgd_fast._torch.settings import Settings
    from asgd_fast._torch.state import ParamState, State

# How many units in its last place a marked t0 is above the whole number that it stands for. A t0
# that somebody has computed, such as 0.07 * 100, is off by one or a few.
_MARK = 165

# Where t0 does not follow from mu, mu is saved as step - t0 times so little that no average moves.
# mu itself follows from step - t0. With average_every it is 0 in most steps, and with a decayed
# average it soon changes no more.
_LITTLE = 2.0**-100

# As far as torch may have rounded a mu: to bfloat16, that of its param.
_ROUNDING = 2.0**-8


def pack(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint in torch's form, a hook after torch has made it.

    A ZeroRedundancyOptimizer takes the states from it, but not the groups, so that nothing can be
    marked there.
    """
    may_mark = optimizer._settings.redundancy.wrapper() is None
    state = complete(state_dict["state"])
    for group in state_dict["param_groups"]:
        drop_usual(group)
        entries = {key: state[key] for key in group["params"] if key in state}
        if may_mark and any("t0" in entry for entry in entries.values()):
            _pack_starts(state, group, entries)
    return {**state_dict, "state": state}


def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of copies, all of it checked, a hook before torch loads it.

    Torch would share its tensors, and cast them to the dtype of their params. Hyperparameters that
    a checkpoint of torch does not have stay as they are.

    Raises
    ------
    KeyError, TypeError, ValueError
        An entry is missing, or is not what it may be.
    """
    groups = state_dict["param_groups"]
    own_groups = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(own["params"]) for own in own_groups]:
        return state_dict  # which torch refuses
    keys = chain.from_iterable(group["params"] for group in groups)
    params = chain.from_iterable(own["params"] for own in own_groups)
    param_of = dict(zip(keys, params, strict=True))
    state = {
        key: _checked_copy(f"state[{key!r}]", entry, param_of[key]) if key in param_of else entry
        for key, entry in state_dict["state"].items()
    }
    kept = [{name: own[name] for name in OWN_HYPERPARAMETERS if name in own} for own in own_groups]
    groups = [{**own, **group} for own, group in zip(kept, groups, strict=True)]
    for i, (own, group) in enumerate(zip(own_groups, groups, strict=True)):
        if missing := [name for name in NUMBERS if name not in group]:
            raise KeyError(f"param_groups[{i}]: missing {missing}")
        _check_group(f"param_groups[{i}]", {**own, **group})
    return {**state_dict, "state": state, "param_groups": groups}


def unpack(state: State, groups: Iterable[Group], settings: Settings) -> defaultdict[Tensor, Any]:
    """Return a state that torch has loaded, or that was copied or unpickled, as an optimizer's own.

    Scalars and averages keep their precision, and averages get the dtype that they have in this
    optimizer. Tensors that are shared with other processes stay what they are.

    Parameters
    ----------
    state : dict of Tensor to dict
        It stays as it is.
    groups : iterable of dict
        The optimizer's param_groups. What checkpoints have besides is taken out of them.
    settings : Settings
        The optimizer's.
    """
    result: defaultdict[Tensor, Any] = defaultdict(dict, state)
    for param, entry in state.items():
        if type(entry) is dict and not entry:  # a copy of one that has made no step
            del result[param]
    for group in groups:
        drop_usual(group)
        entries = {p: _released(p, state[p]) for p in group["params"] if has_steps(state.get(p))}
        was_started = group.pop("averaging_started", False)  # in older checkpoints
        if _unpack_starts(group, entries.values()) or was_started:
            start_before_first(result, group)
        for param, entry in entries.items():
            ax = entry.get("ax")
            if isinstance(ax, Tensor) and (param.is_floating_point() or ax.dtype == param.dtype):
                entry["ax"] = ax.to(dtype_of_average(param, settings))
            result[param] = take(param, entry, group, settings)
    return result


def warn_of_lost_settings(group: Group, records: Iterable[ParamState]) -> None:
    """Warn if averages that were loaded have been made with settings that their group lacks.

    ``torch.distributed.checkpoint`` loads what the optimizer that loads has. Before averages begin,
    and of `lr_schedule` at all times, nothing shows that settings were lost.
    """
    if has_own_options(group):
        return
    for record in records:
        if record.param.is_meta:
            continue
        step, mu = floats([record.scalars()[0], record.scalars()[2]])
        t0 = float(group["t0"] if record.own_t0 is None else record.own_t0)
        usual = 1 / max(1, step - t0)
        # Before averages begin mu is 1 with all settings, unless somebody has set it.
        if usual < 1 and 0 <= mu < 1 and not isclose(mu, usual, rel_tol=_ROUNDING):
            warn(
                f"load_state_dict: mu is {mu:g} after step {step:g}, where t0={t0:g} and the "
                f"defaults of average_every and averaging make it {usual:g}; if other ones were "
                "lost, as by torch.distributed.checkpoint, make the optimizer with them, then load"
            )
            return


def take_loaded(optimizer: Any) -> None:
    """Take over what a ZeroRedundancyOptimizer has loaded: it puts entries into the state itself.

    Raises
    ------
    KeyError, TypeError, ValueError
        As `check`.
    """
    redundancy, groups = optimizer._settings.redundancy, optimizer.param_groups
    if redundancy.wrapper() is None:
        return
    state: State = optimizer.state
    loaded = {p: entry for p, entry in state.items() if type(entry) is dict and has_steps(entry)}
    if not loaded and not any(_is_marked(group) for group in groups):
        return
    places = {id(param): i for i, param in enumerate(redundancy.params(groups))}
    for param, entry in loaded.items():
        loaded[param] = _checked_copy(f"state[{places[id(param)]}]", entry, param)
    before = [group["t0"] for group in groups]
    optimizer.state = unpack({**state, **loaded}, groups, optimizer._settings)
    if [group["t0"] for group in groups] != before:
        redundancy.set_t0(groups)


def _pack_starts(state: dict[Any, Any], group: Group, entries: dict[Any, dict[str, Any]]) -> None:
    """Put where the averages of params begin into the t0 of their group, if that can be undone."""
    t0 = float(group["t0"])
    marked = t0 + _MARK * ulp(t0)
    stepped = {key: entry for key, entry in entries.items() if has_steps(entry)}
    if _unmarked(marked) != t0 or not all(x.keys() >= {*SCALARS} for x in stepped.values()):
        return
    packed = {}
    for key, entry in stepped.items():
        step, mu = floats([entry["step"], entry["mu"]])
        start = entry.get("t0", t0)
        packed[key] = {name: x for name, x in entry.items() if name != "t0"}
        if mu == 0 or (mu != 1 and check_averaging(group.get("averaging", "mean")) != "mean"):
            packed[key]["mu"] = torch.full_like(entry["mu"], (step - start) * _LITTLE)
        if _start_of(packed[key], group) != start or _mu_of(packed[key], group) != mu:
            return
    group["t0"] = marked
    for key in entries.keys() - packed.keys():
        del state[key]
    state.update(packed)


def _unpack_starts(group: Group, entries: Iterable[dict[str, Any]]) -> bool:
    """Undo `_pack_starts`; whether there was anything to undo."""
    t0 = _unmarked(float(group.get("t0", 0)))
    if t0 is None:
        return False
    group["t0"] = t0
    for entry in entries:
        start = _start_of(entry, group)
        if "t0" not in entry and start != t0:
            entry["t0"] = start
        if _is_little(float(entry["mu"])):
            entry["mu"] = torch.full_like(entry["mu"], _mu_of(entry, group))
    return True


def _unmarked(t0: float) -> float | None:
    """Return the whole number that a marked t0 stands for; None if it is not marked."""
    whole = float(round(t0)) if isfinite(t0) else t0
    return whole if whole != t0 == whole + _MARK * ulp(whole) else None


def _is_marked(group: Group) -> bool:
    return type(group["t0"]) is float and _unmarked(group["t0"]) is not None


def _start_of(entry: dict[str, Any], group: Group) -> float:
    """Return the t0 by which a param has its mu, in a group of which all averages were started."""
    step, mu = floats([entry["step"], entry["mu"]])
    if mu == 0 or _is_little(mu):
        return step - mu / _LITTLE
    if not mu <= 1:  # which somebody has put there
        return float(group["t0"])
    every: int = group.get("average_every", 1)
    return step - 1 - (round(1 / mu) - 1) * every


def _mu_of(entry: dict[str, Any], group: Group) -> float:
    """Return the mu of a param, in whose place there may be where its average begins."""
    step, mu = floats([entry["step"], entry["mu"]])
    if not _is_little(mu):
        return mu
    every, averaging = group.get("average_every", 1), group.get("averaging", "mean")
    start = _start_of(entry, group)
    _, mu = next_scalars(step, 0.0, 0.0, 0.0, start, every, averaging=averaging)
    return float(scalar_tensor(mu, entry["mu"].dtype))


def _is_little(mu: float) -> bool:
    return 0 < mu < _LITTLE * 2**40


class _Kept:
    """A tensor of the state that torch is not to convert while it loads the rest."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _released(param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the tensors that were kept from torch, and tensors for plain numbers."""
    entry = {name: x.tensor if isinstance(x, _Kept) else x for name, x in entry.items()}
    for name in SCALARS:
        if isinstance(entry.get(name), (int, float)):  # as torch had them in 2020
            entry[name] = scalar_tensor(entry[name], scalar_dtype()).to(param.device)
    return entry


def _checked_copy(name: str, entry: Any, param: Tensor) -> dict[str, Any]:
    """Return an entry of a checkpoint with tensors of its own, or refuse it."""
    if not isinstance(entry, dict):
        raise TypeError(f"{name}: expected a dict, got {type(entry).__name__}")
    # An empty dict is what torch makes of an entry that a flattened checkpoint does not have.
    names = (*SCALARS, "ax", "t0")
    nothing = {key for key in names if isinstance(x := entry.get(key), dict) and not x}
    copies = {key: x for key, x in entry.items() if key not in nothing}
    if not has_steps(copies):
        return copies
    if missing := [key for key in SCALARS if key not in copies]:
        raise KeyError(f"{name}: missing {missing}")
    for key in SCALARS:
        _check_number(f"{name}[{key!r}]", copies[key])
        if not isinstance(copies[key], Tensor):
            copies[key] = number(key, copies[key])  # NumPy's, too
    if "t0" in copies:
        copies["t0"] = check_scalar(f"{name}['t0']", copies["t0"], low=-inf)
    ax = copies.get("ax", param)
    if not isinstance(ax, Tensor):
        raise TypeError(f"{name}['ax']: expected a tensor, got {type(ax).__name__}")
    if not broadcasts(param.shape, ax.shape):
        raise ValueError(
            f"{name}['ax']: shape {tuple(ax.shape)} does not match its param of shape "
            f"{tuple(param.shape)}"
        )
    with torch.inference_mode(False), torch.no_grad():  # which the copies are to outlive
        for key in (*SCALARS, "ax"):
            if isinstance(x := copies.get(key), Tensor):
                check_memory(f"{name}[{key!r}]", x, param)
                copies[key] = _Kept(x.detach().to(param.device, copy=True))
    return copies


def _check_number(name: str, value: Any) -> None:
    """Refuse what is neither a real number nor a tensor that has one."""
    if not isinstance(value, Tensor):
        number(name, value)
    elif value.numel() != 1:
        raise ValueError(f"{name}: expected one number, got a tensor of shape {tuple(value.shape)}")
    elif value.is_complex():
        raise TypeError(f"{name}: expected a real number, got a tensor of {value.dtype}")


def _check_switch(name: str, value: Any) -> None:
    """Refuse what is neither true nor false, such as a tensor of two elements."""
    try:
        bool(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a bool, got {value!r}") from error


def check_memory(name: str, tensor: Tensor, param: Tensor) -> None:
    """Refuse a tensor that has no memory, where its param has, or that leaves out zeros.

    Raises
    ------
    TypeError
        It is such a one.
    """
    if tensor.layout != torch.strided or (tensor.is_meta and not param.is_meta):
        raise TypeError(
            f"{name}: expected a dense tensor with values, got one of {tensor.layout} on "
            f"{tensor.device}"
        )


def _check_group(name: str, group: Group) -> None:
    """Refuse the hyperparameters that a step would refuse, by the name of their group."""
    try:
        for key in SWITCHES:
            _check_switch(key, group[key])
        check_group(group)
        for key in ("lr", "weight_decay"):
            _check_number(key, group[key])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
