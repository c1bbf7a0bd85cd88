"""Averaged SGD on plain arrays: one update (`asgd_`), and the optimizer over many (`ArrayASGD`).

This module knows arrays, groups and the scalars of each param; it does not know torch, nor how the
pass over the memory is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

import numpy as np

from asgd_fast._engines import (
    as_arrays,
    assign,
    copy,
    exchanged,
    from_host,
    is_on_gpu,
    refuse_recording,
    rows_to_exchange,
    template,
    to_host,
    update,
)
from asgd_fast._rows.rows import Rows, dtype_of, is_array
from asgd_fast._warn import warn
from asgd_fast.schedule import (
    AveragingKind,
    AveragingNotBegunWarning,
    LrSchedule,
    check_average_every,
    check_averaging,
    check_lr_schedule,
    check_place,
    check_scalar,
)

__all__ = ["ArrayASGD", "asgd_"]

# Any object that speaks DLPack. Whether it does is checked when its memory is asked for.
Array: TypeAlias = Any

# The hyperparameters of a group, with the least value that each may have.
_LEAST = {"lr": 0.0, "lambd": 0.0, "alpha": 0.0, "t0": -math.inf, "weight_decay": 0.0}

# How saved states have averaging, and "mean" in it.
_SAVED_AVERAGING = np.dtype([("kind", "U10"), ("number", "f8")])
_SAVED_MEAN = ("polynomial", 0.0)


def asgd_(
    params: Array | Iterable[Array],
    grads: Array | Iterable[Array],
    axs: Array | Iterable[Array] | None = None,
    *,
    eta: SupportsFloat,
    mu: SupportsFloat = 1.0,
    lambd: SupportsFloat = 1e-4,
    weight_decay: SupportsFloat = 0.0,
    maximize: bool = False,
    grad_scale: SupportsFloat | None = None,
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
        (C-contiguous, Fortran-contiguous or another order of the axes), in the memory of the CPU or
        of a CUDA device, of any library that speaks DLPack. Written.
    grads : array or iterable of array
        One for each param, of its shape and dtype. Read, and may be read-only. One in the memory of
        the CPU whose layout is not its param's, whatever its strides, is copied first; on a CUDA
        device the layout must be the param's. That of a 0-dimensional param may be a NumPy scalar.
    axs : array or iterable of array, optional
        The averages, one for each param, of its shape and memory layout, and of its dtype or a
        wider one: float32 or float64, or the complex type of such numbers. With a wider one the
        last two lines are computed in it, from the p that was stored. Written. Without them none is
        kept.
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
        must be; two arrays share memory of which one is written, unless the other is a grad that is
        copied first; a param is listed twice.
    BufferError
        The memory of a param or an average may not be written.
    RuntimeError
        ``make_fx`` or ``torch.jit.trace`` is at work, whose graph would lack the update.

    Notes
    -----
    Everything is checked before the first byte is written: a refused call changes nothing. The GIL
    is released during the pass. float32 and float64 results have the bits of
    ``torch.optim.ASGD(foreach=False)`` on the CPU for the same eta and mu, complex ones too, as
    pairs of reals; half types are computed in float32 and rounded once. Autograd is not told of
    the change, so tensors that require grad are refused: pass ``p.detach()``. As in torch's own
    operations, the memory of an array must not be replaced or resized meanwhile by another thread.

    On a CUDA device the pass follows what the stream has to do on which the library of the first
    param works at the moment, and the call does not wait for it. Arrays of libraries that work on
    other streams may come with it: the pass waits there for those streams, and they for the pass.
    The call itself waits for the pass only if a library does not say where it works, as JAX.

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
    refuse_recording("asgd_")
    scale = 1.0 if grad_scale is None else check_scalar("grad_scale", grad_scale)
    names = template("params", params), template("grads", grads), template("axs", axs)
    param_list = as_arrays("params", params)
    rows = Rows(names)
    rows.extend(
        param_list,
        _one_for_each("grads", grads, len(param_list)),
        None if axs is None else _one_for_each("axs", axs, len(param_list)),
        eta=check_scalar("eta", eta),
        mu=check_scalar("mu", mu, high=1.0),
        lambd=check_scalar("lambd", lambd),
        weight_decay=check_scalar("weight_decay", weight_decay),
        grad_scale=-scale if maximize else scale,
        copy_grads=True,
    )
    update(rows)


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
    average_dtype : dtype, optional
        float32 or float64, as NumPy or another library writes them: averages are kept in it where
        it is wider than their params. By default they are kept in the dtype of their params, and
        stop moving when their changes become too small for it.
    lr_schedule : {"torch", "current"}, default="torch"
        "current" makes eta follow lr at once, and makes the steps before averaging begins those of
        plain SGD. In the step that follows k steps::

            eta = lr, and no decay of p                              if k <= t0
            eta = lr / (1 + lambd * lr * (k - t0)) ** alpha          otherwise

    average_every : int, default=1
        Average each so many-th iterate only, from the first one of the average on. The other steps
        do not touch the average.
    averaging : {"mean", ("ema", decay), ("polynomial", power)}, default="mean"
        The weights of the iterates in the average: equal; exponential, as an iterate loses the
        factor `decay` with each later one, 1e-6 <= decay <= 1; or growing as i ** power for the
        i-th, 0 <= power <= 1e6. `Schedule` has the formulas.

    Attributes
    ----------
    param_groups : list of dict
        "params" and the hyperparameters of each group. Hyperparameters may be changed between
        steps; unless `lr_schedule` is "current", a changed lr acts one step late, as in torch.
    average_dtype : numpy.dtype or None
        As given.

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
    >>> with optimizer.averaged_parameters():
    ...     bool(np.abs(w - 1.0).max() < 0.1)
    True
    """

    # In the class, as optimizers that earlier versions have pickled lack them.
    _has_warned = False
    _is_stepping = False

    def __init__(
        self,
        params: Array | Iterable[Array] | Iterable[dict[str, Any]],
        lr: SupportsFloat = 1e-2,
        lambd: SupportsFloat = 1e-4,
        alpha: SupportsFloat = 0.75,
        t0: SupportsFloat = 1e6,
        weight_decay: SupportsFloat = 0.0,
        *,
        maximize: bool = False,
        average_dtype: np.typing.DTypeLike | None = None,
        lr_schedule: LrSchedule = "torch",
        average_every: SupportsIndex = 1,
        averaging: AveragingKind = "mean",
    ) -> None:
        self.average_dtype: np.dtype[Any] | None = _checked_average_dtype(average_dtype)
        self.defaults: dict[str, Any] = _checked_hyperparameters(
            {
                "lr": lr,
                "lambd": lambd,
                "alpha": alpha,
                "t0": t0,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "lr_schedule": lr_schedule,
                "average_every": average_every,
                "averaging": averaging,
            }
        )
        self.param_groups: list[dict[str, Any]] = []
        # One entry for each param, in the order of the groups. None: its average has not begun.
        self._averages: list[Array | None] = []
        # The columns are step, eta and mu.
        self._scalars = np.zeros((0, 3))
        # The t0 of single params; nan where that of the group holds.
        self._starts = np.zeros(0)
        # Params that hold their averages at the moment, by their places.
        self._exchanged: dict[int, Array] | None = None

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

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or another process needs."""
        self._refuse_exchanged("copying the optimizer")
        return {name: x for name, x in vars(self).items() if name != "_is_stepping"}

    @property
    def is_averaging(self) -> bool:
        """Whether the average of any param has begun.

        It begins with the step of its first iterate: number t0 + 2, or the first one after
        `start_averaging`. Until then the param itself stands for it.
        """
        return bool((self._scalars[:, 2] != 1).any())

    @property
    def averages(self) -> list[Array]:
        """The averages, one for each param in the order of the groups.

        Each is an array of the param's library and layout, in its dtype or `average_dtype`, which
        the steps update in place. Until averaging begins there is none, and a copy of the param
        stands for it, which an average equals until then. Inside `averaged_parameters` it is the
        param itself, if that has its dtype.

        Warns
        -----
        AveragingNotBegunWarning
            Once, if steps were made and no average has begun or begins with the next one.
        """
        self._warn_unless_begun()
        return self._averages_or_copies()

    def _averages_or_copies(self) -> list[Array]:
        here = self._exchanged or {}
        return [
            here[i] if i in here else self._new_average(param) if ax is None else ax
            for i, (param, ax) in enumerate(zip(self._params(), self._averages, strict=True))
        ]

    def _warn_unless_begun(self) -> None:
        """Warn once if steps were made, and no average has begun or begins with the next one."""
        steps = self._scalars[:, 0]
        if self._has_warned or self.is_averaging or not steps.any():
            return
        t0 = self._starts_of_each()
        if (steps >= t0 + 1).any():
            return
        self._has_warned = True
        nearest = np.argmin(t0 - steps)
        warn(
            f"averages were asked for after step {steps[nearest]:g}, but none has begun: t0 is "
            f"{t0[nearest]:g}, so the params themselves stand for them; set t0, or call "
            "start_averaging() to begin with the next step",
            AveragingNotBegunWarning,
        )

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

        rows = Rows(("params[{}]", "", ""))
        rows.extend([*self._params(), *params])
        rows.check_overlap()
        averages = [*self._averages, *[None] * len(params)]
        fresh = np.tile([0.0, hyperparameters["lr"], 1.0], (len(params), 1))
        scalars = np.concatenate([self._scalars, fresh])
        starts = np.concatenate([self._starts, np.full(len(params), np.nan)])
        # Once the list has grown, nothing can fail.
        self.param_groups += [{"params": params, **hyperparameters}]
        self._averages, self._scalars, self._starts = averages, scalars, starts

    def step(self, grads: Array | Iterable[Array | None]) -> None:
        """Make one step: update every param that has a grad, and its average, in place.

        Parameters
        ----------
        grads : array or iterable of (array or None)
            One for each param in the order of the groups, as for `asgd_`; None leaves the param as
            it is, its average and its step count too.

        Raises
        ------
        TypeError, ValueError, BufferError
            As `asgd_`, and for a hyperparameter of a group changed to what the constructor refuses.
            Nothing is changed.
        RuntimeError
            Params were put into a group, or taken out, by hand; or the averages stand in the params
            (see `averaged_parameters`); or another thread is in a step of this optimizer. Nothing
            is changed.
        """
        self._refuse_exchanged("step")
        refuse_recording("step")
        if self._is_stepping:  # between this look and the next line no other thread gets the GIL
            raise RuntimeError("step: another thread is making a step of this optimizer")
        self._is_stepping = True
        try:
            self._update(grads)
        finally:
            self._is_stepping = False

    def _update(self, grads: Array | Iterable[Array | None]) -> None:
        """Make the step, all of it checked before anything changes."""
        grad_list = _one_for_each("grads", grads, len(self._averages))
        names = "params[{}]", template("grads", grads), "averages[{}]"
        # Taken down before any library is asked for memory, which may run anything.
        groups = self._params_of_groups()
        hyperparameters = self._hyperparameters()
        param_list = [param for params in groups for param in params]
        first = 0
        begun: dict[int, Array] = {}

        def new_average(i: int) -> Array:
            begun[i] = self._new_average(param_list[i])
            return begun[i]

        rows = Rows(names)
        for params, own in zip(groups, hyperparameters, strict=True):
            part = slice(first, first + len(params))
            rows.extend(
                params,
                grad_list[part],
                self._averages[part],
                scalars=self._scalars[part],
                lr=own["lr"],
                lambd=own["lambd"],
                alpha=own["alpha"],
                t0=own["t0"],
                starts=self._starts[part],
                average_every=own["average_every"],
                averaging=own["averaging"],
                current=own["lr_schedule"] == "current",
                weight_decay=own["weight_decay"],
                grad_scale=-1.0 if own["maximize"] else 1.0,
                first=first,
                new_average=new_average,
                copy_grads=True,
            )
            first = part.stop
        if begun:
            rows.check_overlap()
            for i, ax in begun.items():
                self._averages[i] = ax
        update(rows)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Hold the averages in the params for as long as the context lasts, to evaluate them.

        They trade places in one pass; the params keep their memory, and get their bits back on the
        way out, after an exception too. A param whose averaging has not begun stays as it is.
        Averages that are wider than their params need memory of the size of the params meanwhile.

        Inside, steps are refused. Do not write into the params there: it would go into the
        averages, or be lost. `state_dict` gives what it gives outside.

        Yields
        ------
        None

        Raises
        ------
        RuntimeError
            The averages stand in the params already. Nothing is changed.

        Warns
        -----
        AveragingNotBegunWarning
            As `averages`.
        """
        self._refuse_exchanged("averaged_parameters")
        self._warn_unless_begun()
        arrays = []
        exchanged_ones = {}
        for i, param in self._begun():
            ax = self._averages[i]
            if ax is None:
                continue
            spare = None if dtype_of(ax) == dtype_of(param) else _clone(param)
            arrays.append((param, spare, ax))
            if spare is None:
                exchanged_ones[i] = param
        self._exchanged = exchanged_ones
        try:
            with exchanged(rows_to_exchange(arrays), lambda: rows_to_exchange(arrays)):
                yield
        finally:
            self._exchanged = None

    def copy_averages_to(self, arrays: Array | Iterable[Array]) -> None:
        """Copy the averages into arrays.

        A param whose averaging has not begun is copied itself.

        Parameters
        ----------
        arrays : array or iterable of array
            One for each param in the order of the groups, of its shape, dtype and memory layout:
            other arrays, or the params themselves, which are overwritten by their averages for
            good. Written; averages that are wider are rounded.

        Raises
        ------
        TypeError, ValueError, BufferError
            As `asgd_`. Nothing is changed.

        Warns
        -----
        AveragingNotBegunWarning
            As `averages`.
        """
        refuse_recording("copy_averages_to")
        self._warn_unless_begun()
        targets = _one_for_each("arrays", arrays, len(self._averages))
        sources = self._params()
        for i, param in self._begun():
            ax = self._averages[i]
            sources[i] = param if ax is None or i in (self._exchanged or ()) else ax
        rows = Rows((template("arrays", arrays), "", "averages[{}]"))
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if target is not source:
                rows.extend([target], None, [source], first=i)
        assign(rows)

    def start_averaging(self, group: int | None = None) -> None:
        """Make the next step's iterate the first one in the averages.

        Averages that have begun are begun anew. Params that have no grad in the next step begin
        with their own next step.

        Parameters
        ----------
        group : int, optional
            The place of a group in `param_groups`. By default all of them start.

        Raises
        ------
        IndexError, TypeError
            There is no such group.
        RuntimeError
            The averages stand in the params: see `averaged_parameters`.
        """
        self._refuse_exchanged("start_averaging")
        if group is None:
            chosen = np.ones(len(self._starts), dtype=bool)
        else:
            chosen = self._group_of_each() == check_place("group", group, len(self.param_groups))
        # The next one is number step + 1, and number t0 + 2 is the first.
        starts = np.where(chosen, self._scalars[:, 0] - 1, self._starts)
        scalars = self._scalars.copy()
        scalars[chosen, 2] = 1
        averages = [None if anew else ax for anew, ax in zip(chosen, self._averages, strict=True)]
        self._averages, self._scalars, self._starts = averages, scalars, starts

    def reset_averages(self, group: int | None = None) -> None:
        """Forget the averages, and begin them anew: `start_averaging` by another name.

        `group` is that of `start_averaging`, and so is what is raised.
        """
        self.start_averaging(group)

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot of everything but the params: a flat dict of NumPy arrays.

        Returns
        -------
        dict of str to numpy.ndarray
            "step", "eta", "mu", "start" and "group" of shape (n,) for n params, where "start" is
            t0, of the group or as `start_averaging` has set it; each hyperparameter, of shape
            (len(param_groups),), but "averaging", of a structured dtype, only where that is not
            "mean"; and the averages, or the params that they equal before they begin,
            copied, as "ax.0" to "ax.{n - 1}". It goes
            through ``np.savez(file, **state)`` and ``np.load(file)``, pickle and ``copy.deepcopy``.

        Raises
        ------
        TypeError
            NumPy does not have the dtype of an average (bfloat16).
        RuntimeError
            Params were put into a group, or taken out, by hand.
        """
        hyperparameters = self._hyperparameters()
        state: dict[str, np.typing.NDArray[Any]] = {
            "step": self._scalars[:, 0].astype(np.int64),
            "eta": self._scalars[:, 1].copy(),
            "mu": self._scalars[:, 2].copy(),
            "start": self._starts_of_each(),
            "group": self._group_of_each(),
        }
        columns = {name: [own[name] for own in hyperparameters] for name in hyperparameters[0]}
        averaging = columns.pop("averaging")
        state |= {name: np.array(values) for name, values in columns.items()}
        if set(averaging) != {"mean"}:
            saved = [_SAVED_MEAN if value == "mean" else value for value in averaging]
            state["averaging"] = np.array(saved, _SAVED_AVERAGING)
        for i, ax in enumerate(self._averages_or_copies()):
            state[f"ax.{i}"] = _saved(f"averages[{i}]", ax)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another optimizer stood, over params that it also held.

        The params themselves are yours to restore. Averages get the dtype that they have in this
        optimizer. Nothing is shared with `state_dict` afterwards.

        Parameters
        ----------
        state_dict : mapping of str to array
            What `state_dict` returned, or what ``np.load`` made of it.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown; the number of params or groups, or the shape of an average
            is another, or its numbers are of another kind; a value is out of range. Nothing is
            changed.
        RuntimeError
            The averages stand in the params: see `averaged_parameters`.
        """
        self._refuse_exchanged("load_state_dict")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        expected = self.state_dict()
        means = np.array([_SAVED_MEAN] * len(self.param_groups), _SAVED_AVERAGING)
        expected.setdefault("averaging", means)
        state_dict = {"averaging": means, **state_dict}
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
            if not np.can_cast(value.dtype, wanted.dtype, "same_kind") or (
                name.startswith("ax.") and value.dtype.kind != wanted.dtype.kind
            ):
                raise ValueError(
                    f"state_dict[{name!r}]: dtype {value.dtype} does not match the "
                    f"optimizer's {wanted.dtype}"
                )
        if not np.array_equal(state["group"], expected["group"]):
            raise ValueError(
                f"state_dict['group']: the params are grouped as {state['group'].tolist()}, "
                f"the optimizer's as {expected['group'].tolist()}"
            )
        for name, low, high in (
            ("step", 0, 2.0**53),  # whose next whole number is no float
            ("eta", 0, math.inf),
            ("mu", 0, 1),
            ("start", -math.inf, math.inf),
        ):
            for i, value in enumerate(state[name]):
                check_scalar(f"state_dict[{name!r}][{i}]", value, low=low, high=high)
        hyperparameters = [
            _checked_hyperparameters(
                # Not [k].item(), in which NumPy crashes where a string finds no memory.
                {name: state[name].item(k) for name in {*self.defaults, "averaging"}},
                f"state_dict of param_groups[{k}]: ",
            )
            for k in range(len(self.param_groups))
        ]
        begins = state["mu"] != 1
        begun = [
            self._new_average(param) if begins[i] else None
            for i, param in enumerate(self._params())
        ]
        rows = Rows(("averages[{}]", "state_dict['ax.{}']", ""))
        for i, average in enumerate(begun):
            if average is None:
                continue
            source = expected[f"ax.{i}"]
            source[...] = state[f"ax.{i}"]  # which may come in another order of the axes
            if is_on_gpu(average):
                from_host(average, source)
            else:
                rows.extend([average], [source], first=i)
        copy(rows)
        scalars = np.column_stack([state["step"], state["eta"], state["mu"]]).astype(np.float64)
        t0s = np.array([own["t0"] for own in hyperparameters])[expected["group"]]
        starts = np.where(state["start"] == t0s, np.nan, state["start"]).astype(np.float64)
        groups = list(zip(self.param_groups, hyperparameters, strict=True))
        self._averages, self._scalars, self._starts = begun, scalars, starts
        for group, own in groups:
            group.update(own)

    def _params_of_groups(self) -> list[list[Array]]:
        groups = [list(group["params"]) for group in self.param_groups]
        n = sum(map(len, groups))
        if n != len(self._averages):
            raise RuntimeError(
                f"param_groups: holds {n} params, but the optimizer was given "
                f"{len(self._averages)}; add params with add_param_group"
            )
        return groups

    def _params(self) -> list[Array]:
        return list(chain.from_iterable(self._params_of_groups()))

    def _begun(self) -> Iterator[tuple[int, Array]]:
        """Yield the places of the params whose averages have begun, and the params."""
        for i, param in enumerate(self._params()):
            if self._scalars[i, 2] != 1:
                yield i, param

    def _new_average(self, param: Array) -> Array:
        """Return a copy of a param, in the dtype of its average."""
        return _clone(param, self._wide(param))

    def _wide(self, param: Array) -> str | None:
        """Return the dtype of a param's average, if that is not the param's own."""
        dtype = dtype_of(param)
        if self.average_dtype is None:
            return None
        narrow = "float16" if dtype == "bfloat16" else dtype
        wide = np.promote_types(narrow, self.average_dtype).name
        return None if wide == narrow else wide

    def _refuse_exchanged(self, call: str) -> None:
        if self._exchanged is not None:
            raise RuntimeError(
                f"{call}: is not possible inside averaged_parameters(), where the averages stand "
                "in the params"
            )

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [
            _checked_hyperparameters(group, f"param_groups[{k}]: ")
            for k, group in enumerate(self.param_groups)
        ]

    def _starts_of_each(self) -> np.typing.NDArray[np.float64]:
        return np.where(np.isnan(self._starts), self._t0_of_each(), self._starts)

    def _t0_of_each(self) -> np.typing.NDArray[np.float64]:
        t0s = [float(group["t0"]) for group in self.param_groups]
        return np.array(t0s)[self._group_of_each()]

    def _group_of_each(self) -> np.typing.NDArray[np.int64]:
        return np.repeat(
            np.arange(len(self.param_groups), dtype=np.int64), [*map(len, self._params_of_groups())]
        )


def _checked_hyperparameters(group: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a group's hyperparameters alone, each a float in its range or a bool."""
    checked: dict[str, Any] = {}
    try:
        for name, low in _LEAST.items():
            value = group[name]
            # Most values are such floats, and each step of a small array waits for these checks.
            if type(value) is not float or not (low <= value and -math.inf < value < math.inf):
                value = check_scalar(name, value, low=low)
            checked[name] = value
        checked["maximize"] = bool(group["maximize"])
        checked["lr_schedule"] = check_lr_schedule(group["lr_schedule"])
        checked["average_every"] = check_average_every(group["average_every"])
        # Optimizers that were pickled by earlier versions have none.
        checked["averaging"] = check_averaging(group.get("averaging", "mean"))
    except KeyError:
        missing = {*_LEAST, "maximize", "lr_schedule", "average_every"} - group.keys()
        raise ValueError(f"{where}missing {sorted(missing)}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}{error}") from None
    return checked


def _checked_average_dtype(average_dtype: Any) -> np.dtype[Any] | None:
    if average_dtype is None:
        return None
    if type(average_dtype).__name__ == "dtype":  # of torch, whose names are those of NumPy
        name = str(average_dtype).rpartition(".")[2]
    else:
        try:
            name = np.dtype(average_dtype).name
        except TypeError:
            raise TypeError(
                f"average_dtype: expected None, float32 or float64, got {average_dtype!r}"
            ) from None
    if name not in ("float32", "float64"):
        raise ValueError(f"Invalid average_dtype: {name} (expected None, float32 or float64)")
    return np.dtype(name)


def _one_for_each(name: str, arrays: Any, n: int) -> list[Array | None]:
    elements = as_arrays(name, arrays)
    if len(elements) == n:
        return elements
    if elements and not any(array is None or is_array(array) for array in elements):
        raise TypeError(
            f"{name}: got {len(elements)} elements of type {type(elements[0]).__name__} for {n} "
            "params; expected one array for each, such as np.asarray makes of numbers"
        )
    raise ValueError(f"{name}: got {len(elements)} arrays for {n} params; expected one for each")


def _saved(name: str, ax: Array) -> np.typing.NDArray[Any]:
    """Return a copy of an average as a NumPy array."""
    try:
        return to_host(ax)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name}: no NumPy array can hold it ({error}); save it by its own library"
        ) from error


def _clone(array: Array, dtype: str | None = None) -> Array:
    """Return a copy of an array in its layout, and its library if that can copy.

    `dtype` may be "float32", "float64" or "complex128".
    """
    if hasattr(array, "clone"):  # torch
        return array.clone() if dtype is None else getattr(array, _TORCH_NAMES[dtype])()
    if not hasattr(array, "copy"):
        array = np.from_dlpack(array)
    return array.copy(order="K") if dtype is None else array.astype(dtype, order="K")


# The methods that convert a torch tensor.
_TORCH_NAMES = {"float32": "float", "float64": "double", "complex128": "cdouble"}
