"""The hyperparameters of torch's groups, and which of their values are refused."""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

from asgd_fast.schedule import check_average_every, check_lr_schedule, check_scalar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "OWN_HYPERPARAMETERS",
    "Group",
    "check_group",
    "drop_usual",
    "eta_of_tensor",
    "has_own_options",
    "number",
]

Group: TypeAlias = dict[str, Any]

# The hyperparameters that torch does not have, with the values by which steps are torch's. A group
# that lacks one has that value, so that the groups of a checkpoint can be torch's.
OWN_HYPERPARAMETERS = {"lr_schedule": "torch", "average_every": 1}


def has_own_options(group: Group) -> bool:
    """Whether a group has hyperparameters that torch's own function does not know."""
    return any(group.get(name, usual) != usual for name, usual in OWN_HYPERPARAMETERS.items())


def drop_usual(group: Group) -> None:
    """Leave out the hyperparameters that torch does not have where steps are torch's."""
    for name, usual in OWN_HYPERPARAMETERS.items():
        if group.get(name, usual) == usual:
            group.pop(name, None)


def check_group(group: Group) -> None:
    """Refuse hyperparameters that torch lets through or does not know.

    Parameters
    ----------
    group : dict

    Raises
    ------
    TypeError, ValueError
        lambd, alpha or t0 is no finite number, or one of the first two is negative; lr_schedule or
        average_every is not what it may be, or goes with differentiable=True.
    """
    for name, low in (("lambd", 0.0), ("alpha", 0.0), ("t0", -inf)):
        value = group[name]
        if type(value) is not float or not isfinite(value) or value < low:
            check_scalar(name, value, low=low)
    check_lr_schedule(group.get("lr_schedule", "torch"))
    check_average_every(group.get("average_every", 1))
    if group["differentiable"] and has_own_options(group):
        raise ValueError("differentiable: goes only with lr_schedule='torch' and average_every=1")


def eta_of_tensor(lr: Tensor, lambd: float, alpha: float, step: float) -> float:
    """Return eta after `step` steps where lr is a tensor: torch computes it in the dtype of lr."""
    lr = lr.detach().squeeze()
    return float(lr / ((1 + lambd * lr * step) ** alpha))


def number(name: str, value: Any) -> float:
    """Return a hyperparameter as a float, of any size, as torch takes it.

    Parameters
    ----------
    name : str
        What the message calls it.
    value : float or Tensor
        Of one element.

    Raises
    ------
    TypeError
        `value` is no real number.
    """
    if type(value) is float:
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a real number, got {value!r}") from error
