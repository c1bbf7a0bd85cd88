"""What an optimizer has besides torch's attributes, where the wrappers of frameworks find it.

A wrapper that imitates the optimizer's class takes what it lacks from the optimizer, or has a copy
of its ``__dict__``. So an optimizer's defaults may not stand in its class, and what changes stands
in one object that both have. This module knows no params and no steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch

from asgd_fast._torch.groups import OWN_HYPERPARAMETERS
from asgd_fast._torch.redundancy import Redundancy
from asgd_fast._warn import warn

# The keywords that hold for all groups.
KEYWORDS = ("average_dtype", "fused_amp", "lazy_average")

# What copies and pickles of an optimizer have of these, by its names there.
_COPIED = (*KEYWORDS, "_own_defaults", "_scalars_on_device")

_AVERAGE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(eq=False)
class Settings:
    """What an optimizer has besides torch's attributes.

    Attributes
    ----------
    lazy_average, average_dtype, fused_amp
        The optimizer's keywords.
    own_defaults : dict
        The defaults of the hyperparameters that torch does not have.
    scalars_on_device : bool
        Whether the scalars of a GPU's params are in its memory, because a scaler makes steps there.
    is_exchanged : bool
        Whether the averages stand in the params.
    is_stepping : bool
        Whether a step is being made, by whatever thread.
    warned : set of type
        The categories of the warnings that were given, each once.
    had_parameters : bool
        Whether the optimizer was given parameters of a model.
    redundancy : Redundancy
        The ZeroRedundancyOptimizer that made the optimizer, if one did.
    """

    lazy_average: bool = True
    average_dtype: torch.dtype | None = None
    fused_amp: bool = False
    own_defaults: dict[str, Any] = field(default_factory=OWN_HYPERPARAMETERS.copy)
    scalars_on_device: bool = False
    is_exchanged: bool = False
    is_stepping: bool = False
    warned: set[type[Warning]] = field(default_factory=set)
    had_parameters: bool = False
    redundancy: Redundancy = field(default_factory=Redundancy)

    def unusual(self) -> dict[str, Any]:
        """Return the keywords that are not the defaults."""
        own = {name: getattr(self, name) for name in KEYWORDS}
        return {name: value for name, value in own.items() if value != getattr(Settings, name)}

    def refuse_exchanged(self, call: str) -> None:
        """Refuse a call, by its name, while the averages stand in the params."""
        if self.is_exchanged:
            raise RuntimeError(
                f"{call}: is not possible inside averaged_parameters(), where the averages stand "
                "in the params"
            )

    def warn_once(self, category: type[Warning], message: str) -> None:
        """Warn of something unless there was a warning of its category."""
        if category not in self.warned:
            warn(message, category)
            self.warned.add(category)

    def copied(self) -> dict[str, Any]:
        """Return what a copy of the optimizer is to have, by its names there."""
        return {name: getattr(self, name.removeprefix("_")) for name in _COPIED}

    def take(self, copied: dict[str, Any]) -> None:
        """Take over, and out of a dict, what `copied` returned in any version."""
        for name in copied.keys() & set(_COPIED):
            setattr(self, name.removeprefix("_"), copied.pop(name))
        # Earlier versions had fewer of them.
        self.own_defaults = {**OWN_HYPERPARAMETERS, **self.own_defaults}


def shared(name: str, checked: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return an attribute of an optimizer and of its wrappers, kept in their settings."""

    def put(optimizer: Any, value: Any) -> None:
        setattr(optimizer._settings, name, checked(value))

    return property(attrgetter(f"_settings.{name}"), put)


def checked_average_dtype(value: Any) -> torch.dtype | None:
    """Return an average_dtype, which may have been given by its name; refuse others."""
    if value is None:
        return None
    if not isinstance(value, (torch.dtype, str)):
        raise TypeError(
            "average_dtype: expected None, torch.float32 or torch.float64, got "
            f"{value!r} of type {type(value).__name__}"
        )
    dtype = _AVERAGE_DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        raise ValueError(
            f"Invalid average_dtype: {value} (expected None, torch.float32 or torch.float64)"
        )
    return dtype
