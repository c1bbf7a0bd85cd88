"""When to start averaging, as the validation loss tells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import index
from typing import Any, Protocol, SupportsFloat, SupportsIndex

__all__ = ["NonMonotonicTrigger"]

# Where wrappers keep the optimizer: accelerate's and Fabric's, fastai's, Lightning's, and those of
# torch.distributed.
_WRAPPED = ("optimizer", "opt", "_optimizer", "optim")


class Averaging(Protocol):
    """An optimizer whose averages can be started: `ASGD`, `ArrayASGD`."""

    def start_averaging(self) -> None:
        """Make the next step's iterate the first one in the averages."""


class NonMonotonicTrigger:
    """Starts averaging when the validation loss stalls: NT-ASGD.

    It fires at the first check whose loss is greater than the least of all earlier losses but the
    last `patience` of them.

    Parameters
    ----------
    optimizer : ASGD or ArrayASGD
        Whose ``start_averaging()`` is called, for all of its groups. Make it with a `t0` that the
        run does not reach, such as the default. It may be in wrappers that keep it as
        ``optimizer``, ``opt``, ``_optimizer`` or ``optim``, as those of accelerate, fastai and
        torch.distributed do.
    patience : int, default=5
        How many of the latest checks do not count as better ones yet, >= 0: the paper's n, the
        non-monotone interval.
    process_group : torch.distributed.ProcessGroup, optional
        The ranks that decide together, each with a trigger of its own: by the mean of their losses,
        in float64. All of them must then call `step` for each check. The group of all ranks is
        ``torch.distributed.group.WORLD``. By default each rank decides by its own loss.

    Attributes
    ----------
    has_fired : bool
        Whether averaging was started.
    patience : int
    process_group : ProcessGroup or None
    losses : list of float
        Those of all checks until it fired; of a process group, the means.

    Raises
    ------
    TypeError
        `optimizer` has no ``start_averaging``, nor has what it wraps; `patience` is no integer.
    ValueError
        `patience` is negative.

    Notes
    -----
    Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models" (2017), algorithm
    1. There the loss is compared with the least of the last n; the authors' code, which this
    follows, compares it with the least of all but the last n.

    Examples
    --------
    >>> import numpy as np
    >>> from asgd_fast import ArrayASGD, NonMonotonicTrigger
    >>> optimizer = ArrayASGD([np.zeros(3)], lr=0.1, lambd=0.0)
    >>> trigger = NonMonotonicTrigger(optimizer, patience=2)
    >>> [trigger.step(loss) for loss in (5.0, 3.0, 4.0, 3.5, 3.2)]
    [False, False, False, False, True]
    """

    def __init__(
        self, optimizer: object, patience: SupportsIndex = 5, *, process_group: Any = None
    ) -> None:
        self.optimizer: Averaging = _unwrapped(optimizer)
        self.patience: int = _checked_patience(patience)
        self.process_group = process_group
        self.losses: list[float] = []
        self.has_fired: bool = False

    def step(self, validation_loss: SupportsFloat) -> bool:
        """Take note of a validation loss, and start averaging if it has stalled.

        Parameters
        ----------
        validation_loss : float
            A number or an array of one element, less where the model is better. Infinite if the
            model has diverged. Ignored once it has fired. Of a DTensor it is the full value, for
            which the ranks of its mesh communicate.

        Returns
        -------
        bool
            Whether it has fired at this check.

        Raises
        ------
        TypeError
            `validation_loss` is no number.
        ValueError
            `validation_loss` is nan, on any rank of the process group. The check does not count.
        """
        loss = self._mean(validation_loss)
        if self.has_fired:
            return False
        earlier = self.losses[: max(0, len(self.losses) - self.patience)]
        fires = loss > min(earlier, default=math.inf)
        if fires:
            self.optimizer.start_averaging()
            self.has_fired = True
        self.losses.append(loss)
        return fires

    def _mean(self, validation_loss: SupportsFloat) -> float:
        """Return the loss, or the mean of those of all ranks."""
        if self.process_group is None:
            return _checked_loss("validation_loss", validation_loss)
        from torch import distributed

        losses = [math.nan] * distributed.get_world_size(self.process_group)
        loss = math.nan  # refuses the check on the ranks that wait, if it is refused on this one
        try:
            loss = _checked_loss("validation_loss", validation_loss)
        finally:
            distributed.all_gather_object(losses, loss, group=self.process_group)
        return _checked_loss("validation_loss: the mean over the ranks", sum(losses) / len(losses))

    def state_dict(self) -> dict[str, Any]:
        """Return what a trigger needs to go on: plain numbers, by name.

        Returns
        -------
        dict
            "patience", "losses" and "has_fired".
        """
        return {
            "patience": self.patience,
            "losses": list(self.losses),
            "has_fired": self.has_fired,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another trigger stood. The optimizer is restored by its own checkpoint.

        Parameters
        ----------
        state_dict : mapping
            What `state_dict` returned.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown, or a value is not what it must be. Nothing is changed.
        """
        expected = self.state_dict()
        if set(state_dict) != set(expected):
            raise ValueError(
                f"state_dict: expected the names {sorted(expected)}, got {sorted(state_dict)}"
            )
        patience = _checked_patience(state_dict["patience"])
        losses = [
            _checked_loss(f"state_dict['losses'][{i}]", loss)
            for i, loss in enumerate(state_dict["losses"])
        ]
        has_fired = state_dict["has_fired"]
        if not isinstance(has_fired, bool):
            raise TypeError(f"state_dict['has_fired']: expected a bool, got {has_fired!r}")
        self.patience, self.losses, self.has_fired = patience, losses, has_fired


def _unwrapped(optimizer: Any) -> Averaging:
    """Return the outermost one that can start averages of an optimizer in wrappers."""
    chain = [optimizer]
    while not callable(getattr(chain[-1], "start_averaging", None)):
        inside = (getattr(chain[-1], name, None) for name in _WRAPPED)
        inner = next((x for x in inside if x is not None), None)
        if inner is None or any(inner is x for x in chain):
            got = ", which wraps ".join(type(x).__name__ for x in chain)
            raise TypeError(
                f"optimizer: expected one with start_averaging(), such as asgd_fast.ASGD, got {got}"
            )
        chain.append(inner)
    found: Averaging = chain[-1]
    return found


def _checked_patience(patience: Any) -> int:
    try:
        patience = index(patience)
    except TypeError:
        raise TypeError(
            f"patience: expected an integer, got {patience!r} of type {type(patience).__name__}"
        ) from None
    if patience < 0:
        raise ValueError(f"Invalid patience: {patience} (expected 0 <= patience)")
    return int(patience)


def _checked_loss(name: str, loss: Any) -> float:
    try:
        if isinstance(loss, (str, bytes)):
            raise TypeError
        if hasattr(loss, "full_tensor"):  # a DTensor, whose part may be a summand
            loss = loss.full_tensor()
        loss = float(loss.item() if hasattr(loss, "item") else loss)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: expected a real number, got {loss!r} of type {type(loss).__name__}"
        ) from None
    if math.isnan(loss):
        raise ValueError(f"{name}: is nan; expected a number, or inf where the model has diverged")
    return float(loss)
