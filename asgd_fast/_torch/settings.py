"""What an optimizer has besides torch's attributes, where the wrappers of frameworks find it.

A wrapper that imitates the optimizer's class takes what it lacks from the optimizer, or has a copy
of its ``__dict__``. So defaults may not stand in the class, and what changes stands in one object
that both have. This module knows no params and no steps.
"""

from __future__ import annotations

import warnings
from typing import Any, Generic, Protocol, TypeVar, overload

import torch

from asgd_fast._torch.groups import OWN_HYPERPARAMETERS
from asgd_fast._torch.redundancy import Redundancy

__all__ = ["KEYWORDS", "Settings", "Shared"]

T = TypeVar("T")
# The keywords that hold for all groups.
KEYWORDS = ("average_dtype", "fused_amp", "lazy_average")

# What copies and pickles have, by the names that it has there.
_COPIED = (*KEYWORDS, "_own_defaults", "_scalars_on_device")

_AVERAGE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


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
    has_plain_checkpoints : bool
        Whether the hook is there that gives checkpoints torch's form.
    is_exchanged : bool
        Whether the averages stand in the params.
    warned : set of type
        The categories of the warnings that were given, each once.
    is_stepping : bool
        Whether a step is being made, by whatever thread.
    had_parameters : bool
        Whether the optimizer was given parameters of a model.
    redundancy : Redundancy
        The ZeroRedundancyOptimizer that made the optimizer, if one did.
    iterates : dict of Tensor to Tensor
        What is to be put back into params where averages stand, by an optimizer with modes.
    versions : list of int
        Those of the params that there were in its last step, after it; empty where not known.
    """

    def __init__(self) -> None:
        self.lazy_average = True
        self._average_dtype: torch.dtype | None = None
        self.fused_amp = False
        self.own_defaults = dict(OWN_HYPERPARAMETERS)
        self.scalars_on_device = False
        self.has_plain_checkpoints = False
        self.is_exchanged = False
        self.is_stepping = False
        self.warned: set[type[Warning]] = set()
        self.had_parameters = False
        self.redundancy = Redundancy()
        self.iterates: dict[torch.Tensor, torch.Tensor] = {}
        self.versions: list[int] = []

    @property
    def average_dtype(self) -> torch.dtype | None:
        return self._average_dtype

    @average_dtype.setter
    def average_dtype(self, value: Any) -> None:
        self._average_dtype = _checked_average_dtype(value)

    def unusual(self) -> dict[str, Any]:
        """Return the keywords that are not the defaults."""
        usual = Settings()
        return {
            name: getattr(self, name)
            for name in KEYWORDS
            if getattr(self, name) != getattr(usual, name)
        }

    def refuse_exchanged(self, call: str) -> None:
        """Refuse a call, by its name, while the averages stand in the params."""
        if self.is_exchanged:
            raise RuntimeError(
                f"{call}: is not possible inside averaged_parameters(), where the averages stand "
                "in the params"
            )

    def warn_once(self, category: type[Warning], message: str, stacklevel: int) -> None:
        """Warn of something unless there was a warning of its category."""
        if category not in self.warned:
            warnings.warn(message, category, stacklevel)
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


class Shared(Generic[T]):
    """An attribute of an optimizer and of its wrappers, kept in their settings."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, optimizer: None, owner: Any) -> Shared[T]: ...
    @overload
    def __get__(self, optimizer: HasSettings, owner: Any) -> T: ...
    def __get__(self, optimizer: HasSettings | None, owner: Any) -> Shared[T] | T:
        if optimizer is None:
            return self
        value: T = getattr(optimizer._settings, self.name)
        return value

    def __set__(self, optimizer: HasSettings, value: T) -> None:
        setattr(optimizer._settings, self.name, value)


class HasSettings(Protocol):
    """An optimizer, or a wrapper of one."""

    _settings: Settings


def _checked_average_dtype(value: Any) -> torch.dtype | None:
    """Return an average_dtype that may have been given by its name.

    Parameters
    ----------
    value : torch.dtype, str or None

    Raises
    ------
    TypeError
        `value` is neither.
    ValueError
        It is no such dtype as averages may have.
    """
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
