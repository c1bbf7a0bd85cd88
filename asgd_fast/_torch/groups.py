"""The hyperparameters of torch's groups, and which of their values are refused."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import Any, TypeAlias

from torch import Tensor

from asgd_fast.schedule import check_average_every, check_averaging, check_lr_schedule, check_scalar

Group: TypeAlias = dict[str, Any]

# The hyperparameters that torch's groups have: numbers in all versions, switches in newer ones.
NUMBERS = ("lr", "lambd", "alpha", "t0", "weight_decay")
SWITCHES = ("foreach", "maximize", "differentiable", "capturable")

# The hyperparameters that torch does not have, with the values by which steps are torch's. A group
# that lacks one has that value, so that the groups of a checkpoint can be torch's.
OWN_HYPERPARAMETERS = {"lr_schedule": "torch", "average_every": 1, "averaging": "mean"}

# What checks each of these, and returns it as Python's own.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "lr_schedule": check_lr_schedule,
    "average_every": check_average_every,
    "averaging": check_averaging,
}


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
    group.update({name: check(group[name]) for name, check in _CHECKS.items()})


def check_group(group: Group) -> None:
    """Refuse values of hyperparameters that torch lets through, or of which it does not know."""
    for name, low in (("lambd", 0.0), ("alpha", 0.0), ("t0", -inf)):
        value = group[name]
        if type(value) is not float or not isfinite(value) or value < low:
            check_scalar(name, value, low=low)
    for name, usual in OWN_HYPERPARAMETERS.items():
        _CHECKS[name](group.get(name, usual))
    if group["differentiable"] and has_own_options(group):
        raise ValueError(
            "differentiable: goes only with lr_schedule='torch', average_every=1 and "
            "averaging='mean'"
        )


def read_by_steps(group: Group) -> Group:
    """Return what steps read of a group, as its own methods answer if it is a subclass of dict."""
    names = ("params", *NUMBERS, "maximize", "differentiable", "capturable")
    own = {name: group.get(name, usual) for name, usual in OWN_HYPERPARAMETERS.items()}
    return {name: group[name] for name in names} | own


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
