"""Averaged SGD on plain arrays: one update (`asgd_`), and the optimizer over many (`ArrayASGD`).

This module knows arrays, groups and the scalars of each param; it does not know torch, nor how the
pass over the memory is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from asgd_fast._table import Table
from asgd_fast.schedule import check_scalar
from asgd_fast.update import as_arrays, copy, lent, template, update

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

__all__ = ["ArrayASGD", "asgd_"]

# Any object that speaks DLPack. Whether it does is checked when its memory is asked for.
Array: TypeAlias = Any

# Between the calls of `asgd_` they wait here.
_spare_tables: list[Table] = []

# The hyperparameters of a group, with the least value that each may have.
_LEAST = {"lr": 0.0, "lambd": 0.0, "alpha": 0.0, "t0": -math.inf, "weight_decay": 0.0}


def asgd_(
    params: Array | Iterable[Array],
    grads: Array | Iterable[Array],
    axs: Array | Iterable[Array] | None = None,
    *,
    eta: float,
    mu: float = 1.0,
    lambd: float = 1e-4,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float | None = None,
) -> None:
    """Make one step of Averaged SGD in place, in one pass over the memory.

    For each param p with its grad g and average ax, every line rounded once::

        g = g * grad_scale              if grad_scale is given
        g = -g                          if maximize
        g = fma(weight_decay, p, g)     if weight_decay != 0
        p = fma(-eta, g, p * (1 - lambd * eta))
        ax = p                          if mu == 1
        ax = ax + (p - ax) * mu         otherwise

    grads are only read; g lives in registers.

    Parameters
    ----------
    params : array or iterable of array
        float16, bfloat16, float32, float64, complex64 or complex128, of any shape, dense
        (C-contiguous, Fortran-contiguous or another order of the axes), in CPU memory, of any
        library that speaks DLPack. Written.
    grads : array or iterable of array
        One for each param, of its shape, dtype and memory layout. Read, and may be read-only.
    axs : array or iterable of array, optional
        The averages, one for each param, of its shape, dtype and memory layout. Written. Without
        them none is kept.
    eta : float
        Step size, >= 0. A `Schedule` gives it.
    mu : float, default=1.0
        Weight of the new iterate in the average, between 0 and 1. A `Schedule` gives it.
    lambd : float, default=1e-4
        Decay term, >= 0.
    weight_decay : float, default=0.0
        L2 penalty, >= 0.
    maximize : bool, default=False
        Ascend instead.
    grad_scale : float, optional
        What the grads are multiplied by first, >= 0: the inverse of a loss scale.

    Raises
    ------
    TypeError
        An argument is not an array or not a real number.
    ValueError
        A scalar is out of range; an array's dtype, device, shape or memory layout is not what it
        must be; two arrays share memory of which one is written; a param is listed twice.
    BufferError
        The memory of a param or an average may not be written.

    Notes
    -----
    Everything is checked before the first byte is written: a refused call changes nothing. The GIL
    is released during the pass. float32 and float64 results have the bits of
    ``torch.optim.ASGD(foreach=False)`` on the CPU for the same eta and mu, complex ones too, as
    pairs of reals; half types are computed in float32 and rounded once. Autograd is not told of
    the change, so tensors that require grad are refused: pass ``p.detach()``. As in torch's own
    operations, the memory of an array must not be replaced or resized meanwhile by another thread.

    Examples
    --------
    >>> import numpy as np
    >>> from asgd_fast import asgd_
    >>> param, grad, ax = np.ones(3), np.array([1.0, 2.0, 3.0]), np.zeros(3)
    >>> asgd_(param, grad, ax, eta=0.25, mu=0.5, lambd=0.0)
    >>> param
    array([0.75, 0.5 , 0.25])
    >>> ax
    array([0.375, 0.25 , 0.125])
    """
    scale = 1.0 if grad_scale is None else check_scalar("grad_scale", grad_scale)
    names = template("params", params), template("grads", grads), template("axs", axs)
    param_list = as_arrays("params", params)
    with lent(_spare_tables, names) as table:
        table.extend(
            param_list,
            _one_for_each("grads", grads, len(param_list)),
            None if axs is None else _one_for_each("axs", axs, len(param_list)),
            eta=check_scalar("eta", eta),
            mu=check_scalar("mu", mu, high=1.0),
            lambd=check_scalar("lambd", lambd),
            weight_decay=check_scalar("weight_decay", weight_decay),
            grad_scale=-scale if maximize else scale,
        )
        update(table)


class ArrayASGD:
    """Averaged SGD over arrays that you own: ``torch.optim.ASGD`` without torch.

    You compute the gradients; `step` updates the params and their averages in place.

    Parameters
    ----------
    params : array, iterable of array, or iterable of dict
        The arrays to optimize, as for `asgd_`; or groups, each a dict of "params" and the
        hyperparameters in which it differs. Updated in place, never copied.
    lr : float, default=1e-2
        Learning rate, >= 0.
    lambd : float, default=1e-4
        Decay term, >= 0.
    alpha : float, default=0.75
        Power of the decay of the step size, >= 0.
    t0 : float, default=1e6
        The number of steps after which averaging starts. The default is torch's, and means that
        averaging never starts in most runs: set it.
    weight_decay : float, default=0.0
        L2 penalty, >= 0.
    maximize : bool, default=False
        Ascend instead.

    Attributes
    ----------
    param_groups : list of dict
        "params" and the hyperparameters of each group. Hyperparameters may be changed between
        steps; a changed lr acts one step late, as it does in torch.

    Raises
    ------
    TypeError, ValueError, BufferError
        As `asgd_`, for params that could not be updated and hyperparameters out of range.

    See Also
    --------
    asgd_ : the update itself.
    Schedule : the scalars of each param, with their formulas.

    Notes
    -----
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992). Each param
    has its own step count, so that leaving one out of a step delays its schedule, not the others'.
    eta and mu are kept in double; torch rounds its own to its default dtype, so that a whole run
    has its bits where that is float64 (``torch.set_default_dtype``), and each update always has.

    Examples
    --------
    >>> import numpy as np
    >>> from asgd_fast import ArrayASGD
    >>> rng = np.random.default_rng(0)
    >>> w = np.zeros(3)
    >>> optimizer = ArrayASGD([w], lr=0.1, lambd=0.0, t0=100)
    >>> for _ in range(2000):
    ...     noisy_grad = w - 1.0 + rng.normal(size=3)
    ...     optimizer.step([noisy_grad])
    >>> bool(np.abs(optimizer.averages[0] - 1.0).max() < 0.1)
    True
    """

    def __init__(
        self,
        params: Array | Iterable[Array] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        self.defaults = _checked_hyperparameters(
            {
                "lr": lr,
                "lambd": lambd,
                "alpha": alpha,
                "t0": t0,
                "weight_decay": weight_decay,
                "maximize": maximize,
            }
        )
        self.param_groups: list[dict[str, Any]] = []
        # One entry for each param, in the order of the groups. The columns are step, eta and mu.
        self._averages: list[Array] = []
        self._scalars = np.zeros((0, 3))
        self._spare_tables: list[Table] = []

        groups = as_arrays("params", params)
        if not groups:
            raise ValueError("params: expected at least one array, got none")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def __repr__(self) -> str:
        """List the groups, with what each has set."""
        lines = ["ArrayASGD ("]
        for k, group in enumerate(self.param_groups):
            lines.append(f"    group {k}: {len(group['params'])} params")
            lines += [f"        {name}: {group[name]}" for name in self.defaults]
        return "\n".join([*lines, ")"])

    @property
    def averages(self) -> list[Array]:
        """The averages, one for each param in the order of the groups.

        Each is an array of the param's library, dtype and layout, which the steps update in place.
        Until averaging starts it equals the param, as of the param's latest step or, before one, of
        the optimizer's making.
        """
        return list(self._averages)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add a group of params, for instance to train further arrays from now on.

        Parameters
        ----------
        group : dict
            "params", an array or an iterable of array, and any hyperparameters in which the group
            differs from the optimizer's own.

        Raises
        ------
        TypeError, ValueError, BufferError
            As the constructor. Nothing is changed.
        """
        where = f"param_groups[{len(self.param_groups)}]"
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"{where}: expected a dict with the key 'params', got {group!r}")
        unknown = set(group) - {"params"} - set(self.defaults)
        if unknown:
            raise ValueError(
                f"{where}: unknown keys {sorted(unknown)}; expected 'params' and any of "
                f"{sorted(self.defaults)}"
            )
        params = as_arrays(f"{where}['params']", group["params"])
        hyperparameters = _checked_hyperparameters({**self.defaults, **group}, f"{where}: ")

        table = Table(("params[{}]", "", ""))
        table.extend([*self._params(), *params])
        table.check_overlap()
        self._averages += [_clone(param) for param in params]
        self.param_groups.append({"params": params, **hyperparameters})
        fresh = np.tile([0.0, hyperparameters["lr"], 1.0], (len(params), 1))
        self._scalars = np.concatenate([self._scalars, fresh])

    def step(self, grads: Array | Iterable[Array | None]) -> None:
        """Make one step: update every param that has a grad, and its average, in place.

        Parameters
        ----------
        grads : array or iterable of (array or None)
            One for each param in the order of the groups, of its shape, dtype and memory layout;
            None leaves the param as it is, its average and its step count too.

        Raises
        ------
        TypeError, ValueError, BufferError
            As `asgd_`, and for a hyperparameter of a group changed to what the constructor refuses.
            Nothing is changed.
        RuntimeError
            Params were put into a group, or taken out, by hand. Nothing is changed.
        """
        grad_list = _one_for_each("grads", grads, len(self._averages))
        names = "params[{}]", template("grads", grads), "averages[{}]"
        # Taken down before any library is asked for memory, which may run anything.
        groups = [list(group["params"]) for group in self.param_groups]
        hyperparameters = self._hyperparameters()
        stops = list(accumulate(map(len, groups), initial=0))
        if stops[-1] != len(self._averages):
            raise RuntimeError(
                f"param_groups: holds {stops[-1]} params, but the optimizer was given "
                f"{len(self._averages)}; add params with add_param_group"
            )
        parts = map(slice, stops, stops[1:])
        with lent(self._spare_tables, names) as table:
            for params, own, part in zip(groups, hyperparameters, parts, strict=True):
                table.extend(
                    params,
                    grad_list[part],
                    self._averages[part],
                    scalars=self._scalars[part],
                    lr=own["lr"],
                    lambd=own["lambd"],
                    alpha=own["alpha"],
                    t0=own["t0"],
                    weight_decay=own["weight_decay"],
                    grad_scale=-1.0 if own["maximize"] else 1.0,
                    first=part.start,
                    partial=True,
                )
            update(table)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Return a snapshot of everything but the params: a flat dict of NumPy arrays.

        Returns
        -------
        dict of str to numpy.ndarray
            "step", "eta", "mu" and "group" of shape (n,) for n params; each hyperparameter, of
            shape (len(param_groups),); and the averages, copied, as "ax.0" to "ax.{n - 1}". It goes
            through ``np.savez(file, **state)`` and ``np.load(file)``, pickle and ``copy.deepcopy``.

        Raises
        ------
        TypeError
            NumPy does not have the dtype of an average (bfloat16).
        """
        hyperparameters = self._hyperparameters()
        state: dict[str, npt.NDArray[Any]] = {
            "step": self._scalars[:, 0].astype(np.int64),
            "eta": self._scalars[:, 1].copy(),
            "mu": self._scalars[:, 2].copy(),
            "group": self._group_of_each(),
        }
        for name in self.defaults:
            state[name] = np.array([own[name] for own in hyperparameters])
        for i, ax in enumerate(self._averages):
            state[f"ax.{i}"] = _saved(f"averages[{i}]", ax)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another optimizer stood, over params that it also held.

        The params themselves are yours to restore. Nothing is shared with `state_dict` afterwards.

        Parameters
        ----------
        state_dict : mapping of str to array
            What `state_dict` returned, or what ``np.load`` made of it.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown; the number of params or groups, or the shape or dtype of
            an average is another; a value is out of range. Nothing is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        expected = self.state_dict()
        missing, unknown = expected.keys() - set(state_dict), set(state_dict) - expected.keys()
        if missing or unknown:
            raise ValueError(
                f"state_dict: does not fit {len(self._averages)} params in "
                f"{len(self.param_groups)} groups: missing {sorted(missing)}, "
                f"unknown {sorted(unknown, key=str)}"
            )
        state = {name: np.asarray(state_dict[name]) for name in expected}
        for name, value in state.items():
            wanted = expected[name]
            if value.shape != wanted.shape:
                raise ValueError(
                    f"state_dict[{name!r}]: shape {value.shape} does not match the "
                    f"optimizer's {wanted.shape}"
                )
            casting: Literal["no", "same_kind"] = "no" if name.startswith("ax.") else "same_kind"
            if not np.can_cast(value.dtype, wanted.dtype, casting):
                raise ValueError(
                    f"state_dict[{name!r}]: dtype {value.dtype} does not match the "
                    f"optimizer's {wanted.dtype}"
                )
        if not np.array_equal(state["group"], expected["group"]):
            raise ValueError(
                f"state_dict['group']: the params are grouped as {state['group'].tolist()}, "
                f"the optimizer's as {expected['group'].tolist()}"
            )
        for name, low, high in (("step", 0, math.inf), ("eta", 0, math.inf), ("mu", 0, 1)):
            for i, value in enumerate(state[name]):
                check_scalar(f"state_dict[{name!r}][{i}]", value, low=low, high=high)
        hyperparameters = [
            _checked_hyperparameters(
                {name: state[name][k].item() for name in self.defaults},
                f"state_dict of param_groups[{k}]: ",
            )
            for k in range(len(self.param_groups))
        ]
        # A saved average may come back in another order of the axes.
        loaded = [expected[f"ax.{i}"] for i in range(len(self._averages))]
        for i, ax in enumerate(loaded):
            ax[...] = state[f"ax.{i}"]
        table = Table(("averages[{}]", "state_dict['ax.{}']", ""))
        table.extend(self._averages, loaded)
        copy(table)
        self._scalars[:] = np.column_stack([state["step"], state["eta"], state["mu"]])
        for group, own in zip(self.param_groups, hyperparameters, strict=True):
            group.update(own)

    def _params(self) -> list[Array]:
        return [param for group in self.param_groups for param in group["params"]]

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [
            _checked_hyperparameters(group, f"param_groups[{k}]: ")
            for k, group in enumerate(self.param_groups)
        ]

    def _group_of_each(self) -> npt.NDArray[np.int64]:
        return np.repeat(
            np.arange(len(self.param_groups), dtype=np.int64),
            [len(group["params"]) for group in self.param_groups],
        )


def _checked_hyperparameters(group: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a group's hyperparameters alone, each a float in its range or a bool."""
    missing = {*_LEAST, "maximize"} - group.keys()
    if missing:
        raise ValueError(f"{where}missing {sorted(missing)}")
    try:
        checked: dict[str, Any] = {
            name: check_scalar(name, group[name], low=low) for name, low in _LEAST.items()
        }
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}{error}") from None
    checked["maximize"] = bool(group["maximize"])
    return checked


def _one_for_each(name: str, arrays: Any, n: int) -> list[Array | None]:
    arrays = as_arrays(name, arrays)
    if len(arrays) != n:
        raise ValueError(f"{name}: got {len(arrays)} arrays for {n} params; expected one for each")
    return list(arrays)


def _saved(name: str, ax: Array) -> npt.NDArray[Any]:
    """Return a copy of an average as a NumPy array."""
    try:
        lent: npt.NDArray[Any] = np.from_dlpack(ax)
    except (BufferError, RuntimeError) as error:
        raise TypeError(
            f"{name}: no NumPy array can hold it ({error}); save it by its own library"
        ) from error
    saved: npt.NDArray[Any] = lent.copy(order="K")
    return saved


def _clone(array: Array) -> Array:
    """Return a copy of an array in its dtype and layout, and its library if that can copy."""
    if hasattr(array, "clone"):  # torch
        return array.clone()
    if hasattr(array, "copy"):  # NumPy, CuPy
        return array.copy(order="K")
    return np.from_dlpack(array).copy(order="K")
