"""The hyperparameters of torch's groups, and which of their values are refused."""

from __future__ import annotations

from math import inf, isfinite
from typing import Any, TypeAlias

from torch import Tensor

from asgd_fast.schedule import (
    check_average_every,
    check_averaging,
    check_lr_schedule,
    check_scalar,
)

__all__ = [
    "OWN_HYPERPARAMETERS",
    "Group",
    "check_group",
    "drop_usual",
    "has_own_options",
    "is_of_floats",
    "make_plain",
    "number",
    "scalars_in_types",
]

Group: TypeAlias = dict[str, Any]

# The hyperparameters that torch does not have, with the values by which steps are torch's. A group
# that lacks one has that value, so that the groups of a checkpoint can be torch's.
OWN_HYPERPARAMETERS = {"lr_schedule": "torch", "average_every": 1, "averaging": "mean"}


def has_own_options(group: Group) -> bool:
    """Whether a group has hyperparameters that torch's own function does not know."""
    return any(group.get(name, usual) != usual for name, usual in OWN_HYPERPARAMETERS.items())


def drop_usual(group: Group) -> None:
    """Leave out the hyperparameters that torch does not have where steps are torch's."""
    for name, usual in OWN_HYPERPARAMETERS.items():
        if group.get(name, usual) == usual:
            group.pop(name, None)


def make_plain(group: Group) -> None:
    """Put Python's own numbers and strings into the hyperparameters that torch does not have.

    ``torch.load(weights_only=True)`` refuses NumPy's in a checkpoint.
    """
    group["lr_schedule"] = check_lr_schedule(group["lr_schedule"])
    group["average_every"] = check_average_every(group["average_every"])
    group["averaging"] = check_averaging(group["averaging"])


def check_group(group: Group) -> None:
    """Refuse hyperparameters that torch lets through or does not know.

    Parameters
    ----------
    group : dict

    Raises
    ------
    TypeError, ValueError
        lambd, alpha or t0 is no finite number, or one of the first two is negative; a
        hyperparameter that torch does not have is not what it may be, or goes with
        differentiable=True.
    """
    for name, low in (("lambd", 0.0), ("alpha", 0.0), ("t0", -inf)):
        value = group[name]
        if type(value) is not float or not isfinite(value) or value < low:
            check_scalar(name, value, low=low)
    check_lr_schedule(group.get("lr_schedule", "torch"))
    check_average_every(group.get("average_every", 1))
    check_averaging(group.get("averaging", "mean"))
    if group["differentiable"] and has_own_options(group):
        raise ValueError(
            "differentiable: goes only with lr_schedule='torch', average_every=1 and "
            "averaging='mean'"
        )


def is_of_floats(group: Group) -> bool:
    """Whether a group's scalars are Python's own numbers, whose arithmetic is that of doubles."""
    return all(type(group[name]) in (float, int) for name in ("lr", "lambd", "alpha", "t0"))


def scalars_in_types(group: Group, eta: float, step: float) -> tuple[Any, Any, Any]:
    """Return what torch's expressions give in the types that a group's hyperparameters have.

    That is what the step with `eta` and of number `step` multiplies params by, and eta and mu for
    the next one, each a number, array or tensor. NumPy's scalars and tensors have an arithmetic of
    their own, and other last bits than floats.
    """
    lr, lambd = group["lr"], group["lambd"]
    if isinstance(lr, Tensor):
        lr = lr.detach().squeeze()
    next_eta = lr / ((1 + lambd * lr * step) ** group["alpha"])
    return 1 - lambd * eta, next_eta, 1 / max(1, step - group["t0"])


def number(name: str, value: Any) -> float:
    """Return a hyperparameter as a float, of any size, as torch takes it."""
    if type(value) is float:
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a real number, got {value!r}") from error
