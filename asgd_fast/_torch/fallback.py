"""What no engine takes, stepped by torch's own function, with its results and its speed.

This module knows params with their groups and states; it does not know why they are left to torch.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.asgd import asgd as torch_asgd

from asgd_fast._schedule import next_scalars
from asgd_fast._torch.conversions import broadcasts
from asgd_fast._torch.groups import (
    NUMBERS,
    SWITCHES,
    has_own_options,
    is_of_floats,
    number,
    scalars_in_types,
)
from asgd_fast._torch.internals import FOREACH_TAKES_HOST_SCALARS
from asgd_fast._torch.record import SCALARS, scalar_tensor
from asgd_fast._torch.scalars import to_device
from asgd_fast._torch.state import ParamState, new_average

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asgd_fast._torch.groups import Group

# A param that no engine takes, with its group, its gradient and its state.
Remaining: TypeAlias = "tuple[Group, Tensor, Tensor, ParamState]"

# What torch's function takes of a group.
_OPTIONS = (*NUMBERS, *SWITCHES)


def prepare(remaining: Sequence[Remaining]) -> None:
    """Refuse what torch's function would refuse half-way, and let averages begin.

    Raises
    ------
    RuntimeError
        A gradient is sparse.
    KeyError, ValueError
        A state lacks an entry, or its average has another shape than its param; or capturable goes
        with a keyword that torch does not know.
    """
    if any(grad.is_sparse for _, _, grad, _ in remaining):
        raise RuntimeError("ASGD does not support sparse gradients")
    for group, param, _, record in remaining:
        if group["capturable"] and has_own_options(group):
            raise ValueError(
                "capturable: goes with lr_schedule='current', average_every > 1 or another "
                "averaging than 'mean' only for params that CUDA kernels take; got one on "
                f"{param.device}"
            )
        record.open()
        shape = tuple(param.shape)
        if missing := sorted(record.missing()):
            raise KeyError(f"state: {missing} missing for a param of shape {shape}")
        if group["capturable"] and param.is_cuda and not record["step"].is_cuda:
            to_device(record, param.device)  # where torch then takes it
        got = shape if record.ax is None else tuple(record.ax.shape)
        if not broadcasts(shape, got):
            raise ValueError(
                f"state: 'ax' of shape {got} does not match its param of shape {shape}"
            )
    without = [record for *_, record in remaining if record.ax is None]
    for record, ax in [(record, new_average(record, copies=True)) for record in without]:
        record.ax = ax


def step(remaining: Sequence[Remaining], unscale: float) -> None:
    """Update params, once they are prepared, by torch's function; multiply gradients first."""
    for _, together in groupby(remaining, key=_what_torch_takes_together):
        groups, params, found, records = zip(*together, strict=True)
        grads = [grad if unscale == 1 else grad * unscale for grad in found]
        if has_own_options(groups[0]):
            for param, record, grad in zip(params, records, grads, strict=True):
                _step_one(groups[0], param, record, grad)
            continue
        options = {name: groups[0][name] for name in _OPTIONS}
        options["t0"] = records[0].get("t0", options["t0"])
        if records[0]["ax"].dtype != params[0].dtype or not all(
            map(_goes_foreach, params, records)
        ):
            options["foreach"] = False
        torch_asgd(
            list(params),
            grads,
            [record["ax"] for record in records],
            [record["mu"] for record in records],
            [record["eta"] for record in records],
            [record["step"] for record in records],
            has_complex=any(param.is_complex() for param in params),
            **options,
        )


def _what_torch_takes_together(one: Remaining) -> tuple[Any, ...]:
    group, param, _, record = one
    return id(group), record["ax"].dtype != param.dtype, record.get("t0")


def _goes_foreach(param: Tensor, record: ParamState) -> bool:
    """Whether torch's foreach takes a param with its scalars where they are."""
    return (
        FOREACH_TAKES_HOST_SCALARS
        or not param.is_cuda
        or all(record[name].is_cuda for name in SCALARS)
    )


def _step_one(group: Group, param: Tensor, record: ParamState, grad: Tensor) -> None:
    """Update a param by torch's own function, with scalars that torch would not compute."""
    options = {name: group[name] for name in _OPTIONS}
    lr, lambd, alpha = (number(name, group[name]) for name in ("lr", "lambd", "alpha"))
    step, eta, mu = (float(record[name]) for name in SCALARS)
    t0 = float(record["t0"] if "t0" in record else group["t0"])
    is_current = group.get("lr_schedule") == "current"
    if is_current:
        eta, _ = next_scalars(step, lr, lambd, alpha, t0, current=True)
        if step <= t0:
            options["lambd"] = 0.0
    torch_asgd(
        [param],
        [grad],
        [record["ax"] if mu != 0 else torch.empty_like(param)],
        [scalar_tensor(mu or 1.0, torch.float64)],
        [scalar_tensor(eta, torch.float64)],
        [scalar_tensor(step, torch.float64)],
        has_complex=param.is_complex(),
        **{**options, "foreach": False},
    )
    every, averaging = group.get("average_every", 1), group.get("averaging", "mean")
    eta, mu = next_scalars(step + 1, lr, lambd, alpha, t0, every, is_current, averaging)
    if not (is_current or is_of_floats(group)):
        eta = number("eta", scalars_in_types(group, eta, step + 1)[1])
    for name, value in zip(SCALARS, (step + 1, eta, mu), strict=True):
        record[name].fill_(value)
