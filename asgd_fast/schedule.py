"""eta and mu over the steps: the scalars that go with one param, and their ranges.

This module knows no arrays. The recurrence itself stands in _schedule.pyx, by which every step
advances the scalars of its params.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import index
from typing import Any, Literal, SupportsFloat, TypeAlias, get_args

from asgd_fast._schedule import next_scalars

__all__ = [
    "AveragingKind",
    "AveragingNotBegunWarning",
    "LrSchedule",
    "Schedule",
    "check_average_every",
    "check_averaging",
    "check_lr_schedule",
    "check_place",
    "check_scalar",
    "check_step",
]

LrSchedule: TypeAlias = Literal["torch", "current"]
LR_SCHEDULES: tuple[str, ...] = get_args(LrSchedule)

# Which weights iterates have in an average: "mean", ("ema", decay) or ("polynomial", power). A list
# is what JSON makes of a pair.
AveragingKind: TypeAlias = str | tuple[str, float] | list[Any]

_MEAN = "mean"
_AVERAGINGS = "'mean', ('ema', decay) or ('polynomial', power)"

# The number that goes with a kind: its name, its range, and its value that makes the mean. With a
# smaller decay or a larger power, float32 may round the weight of a new iterate to 1, which means
# that averaging has not begun.
_RANGES = {"ema": ("decay", 1e-6, 1.0, 1.0), "polynomial": ("power", 0.0, 1e6, 0.0)}

# What torch calls them in its messages, where it has a message; the others follow its manner.
_TITLES = {"lr": "learning rate"} | {
    name: f"{name} value" for name in ("lambd", "alpha", "t0", "weight_decay")
}


class AveragingNotBegunWarning(UserWarning):
    """Averages were asked for before any has begun, so that the params themselves stand for them.

    There is none where the first begins with the next step, as after ``start_averaging()``.
    ``warnings.simplefilter("ignore", asgd_fast.AveragingNotBegunWarning)`` silences it.
    """


def check_scalar(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
) -> float:
    """Return a hyperparameter as a float; refuse what is no finite number from low to high."""
    try:
        finite = math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last by torch
        raise TypeError(
            f"{name}: expected a real number, got {value!r} of type {type(value).__name__}"
        ) from error
    if not (finite and low <= value <= high):
        bounds = f" <= {high:g}" if math.isfinite(high) else ""
        bounds = (f"{low:g} <= {name}" if math.isfinite(low) else name) + bounds
        raise ValueError(f"Invalid {_TITLES.get(name, name)}: {value} (expected a finite {bounds})")
    return float(value)


def check_place(name: str, value: Any, n: int) -> int:
    """Return the place, from 0 on, of one of n things in a row; it may be counted from the end."""
    try:
        place = index(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected an integer, got {value!r} of type {type(value).__name__}"
        ) from None
    if not -n <= place < n:
        raise IndexError(f"{name}: got {place} for {n} {name}s; expected {-n} <= {name} < {n}")
    return place % n


def check_step(name: str, value: Any) -> int:
    """Return a step count as an int; refuse what is no whole number >= 0."""
    step = check_scalar(name, value)
    if not step.is_integer():
        raise ValueError(f"Invalid {name}: {value} (expected a whole number)")
    return int(step)


def check_lr_schedule(value: Any) -> str:
    """Return an lr_schedule; refuse what there is not."""
    if value is not LR_SCHEDULES[0] and value not in LR_SCHEDULES:
        raise ValueError(f"Invalid lr_schedule: {value!r} (expected 'torch' or 'current')")
    return str(value)


def check_average_every(value: Any) -> int:
    """Return a distance between averaged iterates; refuse what is no whole number >= 1."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = index(value)
        except TypeError:
            raise TypeError(
                f"average_every: expected an integer, got {value!r} of type {type(value).__name__}"
            ) from None
    if value < 1:
        raise ValueError(f"Invalid average_every: {value} (expected 1 <= average_every)")
    return int(value)


def check_averaging(value: Any) -> str | tuple[str, float]:
    """Return the weights of iterates in an average; refuse a kind or number that there is not.

    "mean" is returned for the numbers that make it, too: a decay of 1, and a power of 0.
    """
    if value is _MEAN or (isinstance(value, str) and value == _MEAN):  # the first is quick
        return "mean"
    if isinstance(value, (tuple, list)) and len(value) == 2:
        kind, number = value
        if isinstance(kind, str) and kind in _RANGES:
            name, low, high, of_mean = _RANGES[kind]
            number = check_scalar(f"averaging {name}", number, low=low, high=high)
            return _MEAN if number == of_mean else (str(kind), number)
    elif not isinstance(value, str):
        raise TypeError(
            f"averaging: expected {_AVERAGINGS}, got {value!r} of type {type(value).__name__}"
        )
    raise ValueError(f"Invalid averaging: {value!r} (expected {_AVERAGINGS})")


class Schedule:
    """The scalars of one param over its steps: the step size eta and the averaging weight mu.

    Before the first step, eta = lr and mu = 1. After step number k::

        eta = lr / (1 + lambd * lr * k) ** alpha
        mu = 1 / max(1, k - t0)

    or, for another `averaging`, mu as below.

    Parameters
    ----------
    lr : float, default=1e-2
        Learning rate, >= 0. May be changed between steps; because eta is stored, a change acts one
        step late, as it does in torch.
    lambd : float, default=1e-4
        Decay term, >= 0.
    alpha : float, default=0.75
        Power of the decay of eta, >= 0.
    t0 : float, default=1e6
        The number of steps after which averaging starts. The first iterate that is averaged with
        another, rather than copied, is number t0 + 3 (of a whole t0 >= 0).
    averaging : {"mean", ("ema", decay), ("polynomial", power)}, default="mean"
        The weights of the iterates in the average, by the mu of the m-th of them::

            mu = 1 / m                                        "mean"
            mu = (1 - decay) / (1 - decay ** m)               ("ema", decay)
            mu = (power + 1) / (m + power)                    ("polynomial", power)

        With "ema" an iterate loses the factor `decay` with each later one, 1e-6 <= decay <= 1; with
        "polynomial" the weight of the i-th grows as i ** power, 0 <= power <= 1e6. May be changed
        between steps.

    Attributes
    ----------
    step : int
        The number of steps made.
    eta, mu : float
        The scalars of the next step.

    Raises
    ------
    TypeError, ValueError
        A hyperparameter is no real number, not finite, or out of its range.

    Notes
    -----
    The recurrence is that of ``torch.optim.ASGD``, in double precision: Polyak and Juditsky,
    "Acceleration of stochastic approximation by averaging" (1992), with the step sizes of Bottou's
    and Xu's averaged SGD. Polynomial weights: Shamir and Zhang, "Stochastic gradient descent for
    non-smooth optimization" (2013). Those of "ema" are normalized, as Adam's are by its bias
    correction.

    Examples
    --------
    >>> from asgd_fast import Schedule
    >>> schedule = Schedule(lr=0.5, lambd=0.0, t0=1)
    >>> for _ in range(3):
    ...     schedule.advance()
    >>> schedule.step, schedule.eta, schedule.mu
    (3, 0.5, 0.5)
    """

    # Here, for schedules that were pickled by earlier versions.
    averaging: AveragingKind = _MEAN

    def __init__(
        self,
        lr: SupportsFloat = 1e-2,
        lambd: SupportsFloat = 1e-4,
        alpha: SupportsFloat = 0.75,
        t0: SupportsFloat = 1e6,
        *,
        averaging: AveragingKind = "mean",
    ) -> None:
        self.lr: float = check_scalar("lr", lr)
        self.lambd: float = check_scalar("lambd", lambd)
        self.alpha: float = check_scalar("alpha", alpha)
        self.t0: float = check_scalar("t0", t0, low=-math.inf)
        self.averaging = check_averaging(averaging)
        self.step: int = 0
        self.eta: float = self.lr
        self.mu: float = 1.0

    def __repr__(self) -> str:
        """Name the hyperparameters and where the schedule stands."""
        return (
            f"Schedule(lr={self.lr}, lambd={self.lambd}, alpha={self.alpha}, t0={self.t0}"
            f"{f', averaging={self.averaging}' if self.averaging != _MEAN else ''}; "
            f"step={self.step}, eta={self.eta}, mu={self.mu})"
        )

    def advance(self) -> None:
        """Count one step, and set eta and mu for the next.

        Raises
        ------
        TypeError, ValueError
            A hyperparameter was changed to what the constructor refuses. Nothing is changed.
        """
        eta, mu = next_scalars(
            self.step + 1,
            check_scalar("lr", self.lr),
            check_scalar("lambd", self.lambd),
            check_scalar("alpha", self.alpha),
            check_scalar("t0", self.t0, low=-math.inf),
            averaging=check_averaging(self.averaging),
        )
        self.step, self.eta, self.mu = self.step + 1, eta, mu

    def state_dict(self) -> dict[str, float]:
        """Return the hyperparameters and the scalars, by name.

        Returns
        -------
        dict of str to float
            Plain numbers; ``np.savez(file, **state)`` keeps their bits. The decay or the power of
            `averaging` by the name "ema" or "polynomial", unless that is "mean".
        """
        state = dict(vars(self))
        averaging = check_averaging(state.pop("averaging", _MEAN))
        if not isinstance(averaging, str):
            state.update([averaging])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another schedule stood.

        Parameters
        ----------
        state_dict : mapping of str to float
            What `state_dict` returned; numbers or 0-dimensional arrays.

        Raises
        ------
        ValueError, TypeError
            A name is missing or unknown, or a value is not what it must be. Nothing is changed.
        """
        kinds = [kind for kind in _RANGES if kind in state_dict]
        expected = vars(self).keys() - {"averaging"}
        if set(state_dict) - set(kinds[:1]) != expected:
            raise ValueError(
                f"state_dict: expected the names {sorted(expected)}, and perhaps one of "
                f"{list(_RANGES)}, got {sorted(state_dict)}"
            )
        other = Schedule(
            *(state_dict[name] for name in ("lr", "lambd", "alpha", "t0")),
            averaging=(kinds[0], state_dict[kinds[0]]) if kinds else _MEAN,
        )
        other.step = check_step("step", state_dict["step"])
        other.eta = check_scalar("eta", state_dict["eta"])
        other.mu = check_scalar("mu", state_dict["mu"], high=1.0)
        vars(self).update(vars(other))
