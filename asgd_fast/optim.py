"""The torch optimizer: ``from asgd_fast import ASGD`` in place of ``from torch.optim import ASGD``.

This module knows what torch's programs do with an optimizer. It does not know how the state is kept
nor how the pass over the memory is made; what no engine takes goes to torch's own ``asgd``.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import wraps
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.optim.asgd import asgd as torch_asgd
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.torch_version import TorchVersion

from asgd_fast import _core
from asgd_fast._schedule import next_scalars
from asgd_fast._torch import averages as _averages
from asgd_fast._torch import state as _state
from asgd_fast._torch.slots import Slot, Slots, check_group
from asgd_fast._torch.state import OWN_HYPERPARAMETERS, Group, extent, rounds_scalars
from asgd_fast._rows.rows import Rows, lent
from asgd_fast._torch.internals import increment_versions
from asgd_fast.threads import threads_for
from asgd_fast._engines import on_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.optim.optimizer import ParamsT

__all__ = ["ASGD"]


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step as torch does, with hooks and a profiler range, when there are any.

    Torch's own wrapper takes 7 us, more than a step of few small params. A closure may register
    hooks. Observers other than the profiler, such as ``ExecutionTraceObserver``, miss the range.
    """
    in_full = torch.optim.Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: ASGD, *args: Any, **kwargs: Any) -> Any:
        if (
            args
            or kwargs
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return in_full(self, *args, **kwargs)
        return step(self)

    wrapper.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it again
    return wrapper


class ASGD(torch.optim.ASGD):
    r"""Averaged SGD with the bits of ``torch.optim.ASGD(foreach=False)``, in one pass over memory.

    Arguments, defaults, messages, hooks, state and checkpoints are those of ``torch.optim.ASGD``,
    of which this is a subclass. For each param p with its gradient g and its average ax, every line
    rounded once::

        g = g / loss_scale              under a GradScaler
        g = -g                          if maximize
        g = fma(weight_decay, p, g)     if weight_decay != 0
        p = fma(-eta, g, p * (1 - lambd * eta))
        ax = p                          if mu == 1
        ax = ax + (p - ax) * mu         otherwise

    and then, after step number k::

        eta = lr / (1 + lambd * lr * k) ** alpha
        mu = 1 / max(1, k - t0)

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor) or of dict
        The tensors to optimize, named or not, or groups of them with hyperparameters of their own.
        Of every shape, dtype, device and memory layout that torch takes.
    lr : float or Tensor of 1 element, default=1e-2
        Learning rate, >= 0. A change acts one step late, since eta is stored.
    lambd : float, default=1e-4
        Decay term, >= 0.
    alpha : float, default=0.75
        Power of the decay of eta, >= 0.
    t0 : float, default=1e6
        The number of steps after which averaging starts. With the default it never does in most
        runs: set it. The first iterate that is averaged with another is number t0 + 3.
    weight_decay : float, default=0
        L2 penalty, >= 0.
    foreach : bool, optional
        Chooses among torch's implementations where one of them is used.
    maximize : bool, default=False
        Ascend instead.
    differentiable : bool, default=False
        As in torch, by torch's own implementation.
    capturable : bool, default=False
        Whether steps may be captured into a CUDA graph: step, eta and mu are then in the memory of
        the GPU, which advances them, and averages have memory of their own from the first step on.
        For params in CPU memory as in torch.
    lazy_average : bool, default=True
        Until averaging begins, an average equals its param: ``state[p]["ax"]`` is then the param's
        own memory, which costs none and is not written to. The step that makes the first iterate of
        the average gives it memory of its own. False gives it that from the first step on, as torch
        does. Not kept in checkpoints, which hold copies either way.

    average_dtype : torch.dtype, optional
        float32 or float64: averages are kept in it where it is wider than their params (complex
        ones as pairs of such numbers), and the lines of ax above are computed in it. By default
        they are kept in the dtype of their params, as in torch; there they stop moving when their
        changes become too small for it. Not kept in checkpoints, whose averages are converted.
    lr_schedule : {"torch", "current"}, default="torch"
        "current" makes eta follow lr at once, and makes the steps before averaging begins those of
        ``torch.optim.SGD(lr, weight_decay=weight_decay)``, bit for bit in float32 and float64. In
        the step that follows k steps::

            eta = lr, and no decay of p                              if k <= t0
            eta = lr / (1 + lambd * lr * (k - t0)) ** alpha          otherwise

    average_every : int, default=1
        Average each so many-th iterate only, from the first one of the average on; the m-th has the
        weight mu = 1 / m. The other steps have mu = 0 and do not touch the average.

    Attributes
    ----------
    param_groups : list of dict
        The groups; hyperparameters, lr_schedule and average_every among them, may be changed
        between steps.
    state : dict of Tensor to dict
        For each param that has been stepped: "ax", its average, in its layout; "step", "eta" and
        "mu", tensors of no dimension, of which the last two are for the next step. All are updated
        in place by the steps. "t0", a number, stands instead of the group's where
        `start_averaging` found params of different step counts.

    Raises
    ------
    TypeError, ValueError
        As ``torch.optim.ASGD``; and for what that lets through: lambd, alpha or t0 that is not
        finite, negative lambd or alpha. A keyword of this class is not what it may be.

    See Also
    --------
    asgd_fast.ArrayASGD : the same without torch.
    asgd_fast.NonMonotonicTrigger : starts averaging when the validation loss stalls.

    Notes
    -----
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).

    The one pass is made over tensors of the CPU or of CUDA devices, of float32, float64, float16,
    bfloat16, complex64 or complex128, whose elements fill a block of memory, in any order of the
    axes. Half types are computed in float32 and rounded once. Everything else, and tensors that
    share memory with each other, go to torch's own ``asgd``, with its results and its speed.

    The GIL is released while memory is updated, and the memory of a tensor must not be replaced or
    resized meanwhile by another thread (``p.data = other``).

    A ``GradScaler`` leaves the unscaling to the step, which reads the gradients and does not write
    them. Where a framework must unscale them first, to clip them, set
    ``optimizer._step_supports_amp_scaling = False``.

    Examples
    --------
    >>> import torch
    >>> from asgd_fast import ASGD
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = ASGD(model.parameters(), lr=0.1, lambd=0.0, t0=100)
    >>> for _ in range(1000):
    ...     x = torch.randn(8, 3)
    ...     noisy = x.sum(dim=1, keepdim=True) + torch.randn(8, 1)
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(x), noisy).backward()
    ...     optimizer.step()
    >>> with optimizer.averaged_parameters():
    ...     bool((model.weight - 1.0).abs().max() < 0.05)
    True
    """

    # GradScaler then sets grad_scale and found_inf, and leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    _slots: Slots | None = None

    # Whether the scalars of a GPU's params are in its memory, because a scaler makes steps there.
    _on_device = False

    # Averages that came from elsewhere with memory of their own, which lazy ones can give up.
    _loaded: tuple[Tensor, ...] = ()

    lazy_average = True
    average_dtype: torch.dtype | None = None

    # The memory of params that averages stand in at the moment; None while they do not.
    _exchanged: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        lazy_average: bool = True,
        average_dtype: torch.dtype | None = None,
        lr_schedule: str = "torch",
        average_every: int = 1,
    ) -> None:
        if average_dtype is not None and not isinstance(average_dtype, torch.dtype):
            raise TypeError(
                "average_dtype: expected None, torch.float32 or torch.float64, got "
                f"{average_dtype!r} of type {type(average_dtype).__name__}"
            )
        if average_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"Invalid average_dtype: {average_dtype} (expected None, torch.float32 or "
                "torch.float64)"
            )
        self._own_defaults = {"lr_schedule": lr_schedule, "average_every": average_every}
        super().__init__(
            params,
            lr,
            lambd,
            alpha,
            t0,
            weight_decay,
            foreach,
            maximize,
            differentiable,
            capturable,
        )
        self._separate_checkpoints()
        self.lazy_average = lazy_average
        self.average_dtype = average_dtype

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of params, as in torch.

        Parameters
        ----------
        param_group : dict
            "params", and any hyperparameters in which the group differs from the optimizer's own.

        Raises
        ------
        TypeError, ValueError
            As the constructor.
        """
        # Torch's constructor comes here with its own defaults only.
        self.defaults = {**self.defaults, **self._own_defaults}
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @_hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step: update every param that has a gradient, and its average, in place.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients anew and returns the loss.

        Returns
        -------
        object
            What `closure` returned, or None.

        Raises
        ------
        RuntimeError
            A gradient is sparse. Nothing is changed.
        TypeError, ValueError
            A hyperparameter was changed to what the constructor refuses. Nothing is changed.
        RuntimeError
            The averages stand in the params: see `averaged_parameters`. Nothing is changed.
        """
        if torch.compiler.is_compiling():
            return _step_uncompiled(self, closure)
        return self._step(closure)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or another process needs."""
        self._refuse_exchanged("copying the optimizer")
        _state.own(_state.strayed(self._slots), self.average_dtype)
        own = ("lazy_average", "average_dtype", "_own_defaults", "_on_device")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, a copy or another process."""
        _state.put_back(state.get("state", {}), self.average_dtype)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _state.widen(self.state, self.average_dtype)
        if self.lazy_average:
            entries = (entry for entry in self.state.values() if isinstance(entry, dict))
            self._loaded = tuple(entry["ax"] for entry in entries if "ax" in entry)
        self._separate_checkpoints()
        with torch.inference_mode(False):
            self._slots = self._find(None)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, as torch does: its tensors are those of the state.

        Averages that have no memory of their own are copied. Inside `averaged_parameters` it is the
        same checkpoint; but the model then saves its averages, and neither has the iterate to go on
        from. So take a checkpoint to resume from outside.

        Returns
        -------
        dict
            For ``load_state_dict`` of this class and of ``torch.optim.ASGD``.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer stood, of this class or ``torch.optim.ASGD``.

        As in torch; but the state is copied, step, eta and mu keep their precision, and averages
        get the dtype that they have in this optimizer. Where `lr_schedule` and `average_every` are
        not in the checkpoint, as it is torch's, they stay.

        Parameters
        ----------
        state_dict : dict
            What ``state_dict()`` returned, in any version of torch.

        Raises
        ------
        ValueError
            It has other groups, or other numbers of params in them.
        RuntimeError
            The averages stand in the params: see `averaged_parameters`.
        """
        self._refuse_exchanged("load_state_dict")
        # Added last, so that the user's own hooks see the dict that they were given.
        hook = self.register_load_state_dict_pre_hook(_state.copied)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Hold the averages in the params for as long as the context lasts, to evaluate the model.

        They trade places in one pass; the params keep their memory, and get their bits back on the
        way out, after an exception too. A param whose averaging has not begun stays as it is.
        Buffers are not touched. Averages that are wider than their params, and those that no engine
        takes, need memory of the size of the params meanwhile.

        Inside, steps are refused; a CUDA graph that is replayed does not ask. Do not write into the
        params there: it would go into the averages, or be lost. `state_dict` gives what it gives
        outside; ``model.state_dict()`` holds the averages.

        Yields
        ------
        None

        Raises
        ------
        RuntimeError
            The averages stand in the params already. Nothing is changed.
        ValueError
            The state has an average of another shape than its param. Nothing is changed.

        Examples
        --------
        >>> import torch
        >>> from asgd_fast import ASGD
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = ASGD([weight], lr=1.0, lambd=0.0, t0=-1)  # averages from the first step on
        >>> for _ in range(3):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> with optimizer.averaged_parameters():
        ...     print(weight.item())
        -2.0
        >>> weight.item()
        -3.0
        """
        self._refuse_exchanged("averaged_parameters")
        self._exchanged = ()
        try:
            with _averages.exchanged(self.state, self.param_groups) as self._exchanged:
                yield
        finally:
            self._exchanged = None

    def copy_averages_to(self, target: torch.nn.Module | Iterable[Tensor]) -> None:
        """Copy the averages into a model, or into tensors.

        A param whose averaging has not begun is copied itself.

        Parameters
        ----------
        target : Module or iterable of Tensor
            The model that is trained, whose params are overwritten by their averages for good. Or
            another model: its parameters go by name where the optimizer was given names; else they
            must be, in their order, those of its only group. Or tensors, one for each param in the
            order of the groups. Values are rounded to the dtypes of the target.

        Raises
        ------
        TypeError
            `target` is neither.
        ValueError
            It has another number of tensors than the optimizer, other names or other shapes; or it
            is not clear which belongs to which. Nothing is changed.

        See Also
        --------
        averaged_state_dict : finds the params in any model, by names.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        targets: list[Any]
        if isinstance(target, torch.nn.Module):
            targets = self._params_in(target, params)
        else:
            targets = list(target) if hasattr(target, "__iter__") else [None]
            if isinstance(target, Tensor) or not all(isinstance(x, Tensor) for x in targets):
                raise TypeError(
                    "target: expected a torch.nn.Module or an iterable of tensors, got "
                    f"{type(target).__name__}"
                )
        if len(targets) != len(params):
            raise ValueError(
                f"target: got {len(targets)} tensors for {len(params)} params; expected one for "
                "each"
            )
        for i, (param, other) in enumerate(zip(params, targets, strict=True)):
            if param.shape != other.shape:
                raise ValueError(
                    f"target: tensor {i} of shape {tuple(other.shape)} does not match its param of "
                    f"shape {tuple(param.shape)}"
                )
        _averages.copy_to(self.state, self.param_groups, zip(params, targets, strict=True))

    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the state dict of the model with the averages in it: the model to ship.

        To resume training, save ``model.state_dict()`` and ``optimizer.state_dict()`` instead.

        Parameters
        ----------
        model : Module
            The one that is trained, or a part of it.

        Returns
        -------
        dict
            What ``model.state_dict()`` returns, copied: averages for the params whose averaging has
            begun, and the rest of the model as it is. Running statistics of batch normalization
            stay those of the iterates: see ``torch.optim.swa_utils.update_bn``.

        Raises
        ------
        ValueError
            The model has none of the optimizer's params.

        Examples
        --------
        >>> import torch
        >>> from asgd_fast import ASGD
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = ASGD(model.parameters(), t0=0)
        >>> shipped = torch.nn.Linear(3, 1)
        >>> shipped.load_state_dict(optimizer.averaged_state_dict(model))
        <All keys matched successfully>
        """
        own = {id(param) for group in self.param_groups for param in group["params"]}
        if not any(id(param) in own for param in model.parameters()):
            raise ValueError("model: has none of the optimizer's params")
        with nullcontext() if self._exchanged is not None else self.averaged_parameters():
            return deepcopy(model.state_dict())

    def start_averaging(self, group: int | None = None) -> None:
        """Make the next step's iterate the first one in the averages.

        Averages that have begun are begun anew. Params that have no gradient in the next step
        begin with their own next step. Sets t0 of the group. A CUDA graph that was captured before
        keeps the t0 that it knew, as all plain numbers: capture anew.

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
        _state.own(_state.strayed(self._slots), self.average_dtype)
        for own in self.param_groups if group is None else [self.param_groups[group]]:
            _state.start(self.state, own, lazy=self.lazy_average, average_dtype=self.average_dtype)
        for slot in chain(*self._slots.groups) if self._slots is not None else ():
            if slot is not None:
                slot.read_start()
        with torch.inference_mode(False):
            self._slots = self._find(self._slots)

    def reset_averages(self, group: int | None = None) -> None:
        """Forget the averages, and begin them anew: the same as `start_averaging`.

        Parameters
        ----------
        group : int, optional
            The place of a group in `param_groups`. By default all of them.

        Raises
        ------
        IndexError, TypeError, RuntimeError
            As `start_averaging`.
        """
        self.start_averaging(group)

    def _separate_checkpoints(self) -> None:
        """Let no checkpoint share memory with params, which are what lazy averages have."""
        if _state.separated not in self._optimizer_state_dict_post_hooks.values():
            # Before the user's own hooks.
            self.register_state_dict_post_hook(_state.separated, prepend=True)

    def _refuse_exchanged(self, call: str) -> None:
        if self._exchanged is not None:
            raise RuntimeError(
                f"{call}: not inside averaged_parameters(), where the averages stand in the params"
            )

    def _params_in(self, model: torch.nn.Module, params: list[Tensor]) -> list[Tensor]:
        """Return the parameter of a model that belongs to each of the optimizer's."""
        others: list[Tensor] = list(model.parameters())
        if {id(param) for param in params} <= {id(other) for other in others}:
            return params
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if len(names) == len(params):
            by_name = dict(model.named_parameters(remove_duplicate=False))
            missing = [name for name in names if name not in by_name]
            if missing:
                raise ValueError(f"target: has no parameters named {missing}")
            return [by_name[name] for name in names]
        if len(self.param_groups) > 1:
            raise ValueError(
                "target: it is not clear which of its parameters belong to which of the "
                f"{len(self.param_groups)} groups; give the optimizer named_parameters(), or load "
                "averaged_state_dict() into it"
            )
        return others

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._exchanged is not None:
            self._refuse_exchanged("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = self.__dict__  # by a scaler, and taken away after the step
        found_inf, scale = given.get("found_inf"), given.get("grad_scale")
        n_known = len(self.state)
        if found_inf is not None and isinstance(found_inf, Tensor) and found_inf.is_cuda:
            # From now on the device has the scalars, as it alone knows whether it made a step.
            self._on_device = True
            if self._slots is None or not self._slots.all_on_device:
                self._slots = self._read_slots()
            if self._slots.all_on_device and self._update_on_devices(found_inf, scale):
                return loss
        if found_inf is None or not found_inf:
            self._update(1.0 if scale is None else _inverse(scale))
        else:
            # A step that is not made leaves no state: it would have the learning rate of now.
            for param in list(self.state)[n_known:]:
                del self.state[param]
        return loss

    def _update_on_devices(self, found_inf: Tensor, scale: Tensor | float | None) -> bool:
        """Let the devices update every param that has a gradient, unless there is a `found_inf`.

        Gradients are divided by `scale`. False where something is to be done by others, which
        cannot be left to the device; nothing is changed then.
        """
        with lent(_spare_tables, _NAMES) as table:
            slots, left = self._gather(table, 1.0)
            if left:
                left = self._fit(left, slots, table, 1.0)
            if left or not slots.all_on_device or not _is_fit(table):
                return False
            if table:
                table.found_inf = _on_each(table.streams, found_inf)
                table.grad_scale = None if scale is None else _on_each(table.streams, scale)
                self._run(table, slots, [], 1.0)
        if self._loaded:
            self._release(slots)
        return True

    def _update(self, unscale: float) -> None:
        """Update every param that has a gradient, by an engine as far as it goes.

        Gradients are multiplied by `unscale` first.
        """
        with lent(_spare_tables, _NAMES) as table:
            slots, left = self._gather(table, unscale)
            if left:
                _check_graph_capture(self)
                if any(_grad_of(slot).is_sparse for _, slot in left):
                    raise RuntimeError("ASGD does not support sparse gradients")
                left = self._fit(left, slots, table, unscale)
            if not _is_fit(table):
                # The order of operations shows where memory is shared: it is to be torch's.
                left = self._active(slots)
            self._run(table, slots, left, unscale)
        if self._loaded:
            self._release(slots)

    def _run(self, table: Rows, slots: Slots, left: list[_Left], unscale: float) -> None:
        """Update the rows of a table, which is checked, and by torch's function what is left."""
        launches = None
        if table.has_gpu_rows:
            capturable = all(group["capturable"] for group in self.param_groups)
            launches = on_devices(table, capturable=capturable)
        if left:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                _step_by_torch(left, unscale, self.average_dtype)
        if table:
            n_threads = threads_for(table)
            # Before the memory changes: nothing fails from here on, unless a device does.
            increment_versions(slots.written)
            if launches is not None:
                launches.run()
            _core.update(table, n_threads)

    def _release(self, slots: Slots) -> None:
        """Give up the memory of averages that were loaded, where the step has made them lazy."""
        _state.release(
            self.state, self.param_groups, self._loaded, average_dtype=self.average_dtype
        )
        self._loaded = ()
        self._slots = self._find(slots)

    def _gather(self, table: Rows, unscale: float) -> tuple[Slots, list[_Left]]:
        """Put into the table what an engine can take as it is; return the rest."""
        slots = self._slots
        is_watched = _is_watched()
        if slots is None or not slots.is_current(self.state) or is_watched:
            slots = self._read_slots()
        if is_watched:
            return slots, self._active(slots)
        groups, on_device = self.param_groups, self._on_device
        left = slots.gather(table, groups, unscale, rounds_scalars(), on_device)
        if left is None:  # a first gradient, or groups or state that were changed by hand
            table.clear()
            slots = self._read_slots()
            left = slots.gather(table, groups, unscale, rounds_scalars(), on_device)
        if left is None:
            raise RuntimeError("param_groups: changed by another thread during the step")
        return slots, left

    def _read_slots(self) -> Slots:
        """Find the state of each param, new where there was none."""
        with _state.alone(), torch.inference_mode(False):  # which the state is to outlive
            _state.create(
                self.state,
                self.param_groups,
                lazy=self.lazy_average,
                average_dtype=self.average_dtype,
            )
            slots = self._find(self._slots)
            begin = [
                slot
                for group, own in zip(self.param_groups, slots.groups, strict=True)
                for slot in own
                if slot is not None and _begins(group, slot)
            ]
            _state.own(begin, self.average_dtype)
            self._slots = self._find(slots)
        return self._slots

    def _find(self, before: Slots | None) -> Slots:
        return _state.find(
            self.state,
            self.param_groups,
            before,
            average_dtype=self.average_dtype,
            on_device=self._on_device,
        )

    def _active(self, slots: Slots) -> list[_Left]:
        """Return every param that has a gradient."""
        return [
            (group, slot)
            for group, own in zip(self.param_groups, slots.groups, strict=True)
            for slot in own
            if slot is not None and slot.param.grad is not None
        ]

    def _fit(self, left: list[_Left], slots: Slots, table: Rows, unscale: float) -> list[_Left]:
        """Put into the table what an engine can take once converted; return the rest."""
        if _is_watched():
            return left
        rest = []
        outside: list[Tensor | None] = []  # of the table, and yet read or written
        for group, slot in left:
            grad = None
            is_capturable = slot.param.is_cuda or not group["capturable"]
            if slot.packed and is_capturable and not group["differentiable"]:
                grad = _converted_grad(slot)
            if grad is not None and slots.add(table, group, slot, grad, unscale, rounds_scalars()):
                outside.append(slot.param.grad)
            else:
                rest.append((group, slot))
                outside += slot.param, slot.param.grad, slot.state.get("ax")
        if any(table.touches(*extent(tensor)) for tensor in outside):
            table.clear()
            return self._active(slots)
        return rest


# A param that no engine took as it is, with its group.
_Left: TypeAlias = tuple[Group, Slot]

# What torch's function takes of a group.
_HYPERPARAMETERS = (
    "lr",
    "lambd",
    "alpha",
    "t0",
    "weight_decay",
    "foreach",
    "maximize",
    "differentiable",
    "capturable",
)

# As factors of tensors on a GPU.
_FOREACH_TAKES_HOST_SCALARS = TorchVersion(torch.__version__) >= "2.7"

# Between steps their memory waits here for the next.
_spare_tables: list[Rows] = []

_NAMES = "params[{}]", "grads[{}]", "averages[{}]"

# Under torch.compile the step is left as it is: faster than what would be compiled.
_step_uncompiled = torch.compiler.disable(ASGD._step)


def _is_watched() -> bool:
    """Whether a mode or transform of torch is to see every operation, so that none is left out."""
    return (
        _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _is_fit(table: Rows) -> bool:
    """Whether no arrays of a table share memory; it is empty otherwise."""
    try:
        table.check_overlap()
    except ValueError:
        return False
    return True


def _begins(group: Group, slot: Slot) -> bool:
    """Whether a lazy average is to have memory of its own in the next step.

    That makes its first iterate, or a later one; or it may be captured into a graph.
    """
    if not slot.is_lazy or slot.param.grad is None:
        return False
    if group["capturable"]:
        return True
    t0 = slot.state["t0"] if "t0" in slot.state else group["t0"]
    if slot.on_device:
        step = slot.at_most
        mu = next_scalars(step, 0.0, 0.0, 0.0, t0, group["average_every"])[1] if step else 1.0
    else:
        step, mu = (float(slot.state[name]) for name in ("step", "mu"))
    _, next_mu = next_scalars(step + 1, 0.0, 0.0, 0.0, t0, group["average_every"])
    return mu != 1 or next_mu != 1


def _on_each(devices: Iterable[int], scalar: Tensor | float) -> dict[int, Tensor]:
    """Return a number as a float32 tensor in the memory of each of some GPUs, by their numbers."""
    places = {i: torch.device("cuda", i) for i in devices}
    if not isinstance(scalar, Tensor):
        return {i: torch.full((), scalar, dtype=torch.float32, device=x) for i, x in places.items()}
    scalar = scalar.detach().float()
    return {i: scalar.to(place, non_blocking=True) for i, place in places.items()}


def _inverse(grad_scale: Any) -> float:
    """Return the factor that ``GradScaler.unscale_`` multiplies by: a float32."""
    return float(
        torch.as_tensor(grad_scale, dtype=torch.float64, device="cpu").reciprocal().float()
    )


def _grad_of(slot: Slot) -> Tensor:
    grad = slot.param.grad
    assert grad is not None
    return grad


@torch.no_grad()
def _converted_grad(slot: Slot) -> Tensor | None:
    """Return the gradient in its param's dtype and layout if that loses nothing, else None.

    The average too is put into the layout of a param that has changed its own. For gradients that
    repeat their memory torch may round in another way, so they stay with it.
    """
    param, grad, ax = slot.param, _grad_of(slot), slot.state["ax"]
    like = torch.empty_like(param)
    if (
        type(grad) is not Tensor
        or grad.layout != torch.strided
        or grad.device != param.device
        or grad.shape != param.shape
        or 0 in grad.stride()
        or grad.is_complex() != param.is_complex()
        or torch.promote_types(grad.dtype, param.dtype) != param.dtype
        or like.stride() != param.stride()
    ):
        return None
    stays = slot.is_lazy or ax.shape != param.shape
    if not stays and ax.stride() != param.stride():
        if ax.untyped_storage().nbytes() != ax.numel() * ax.itemsize:
            return None  # it is part of something larger
        ax.data = torch.empty_like(param, dtype=ax.dtype).copy_(ax)
    return like.copy_(grad)


def _step_by_torch(left: list[_Left], unscale: float, average_dtype: torch.dtype | None) -> None:
    """Update params by torch's own function."""
    _state.own([slot for _, slot in left], average_dtype)
    for group, slot in left:
        if group["capturable"] and _is_own(group):
            raise ValueError(
                "capturable: goes with lr_schedule='current' or average_every > 1 only for params "
                f"that CUDA kernels take; got one on {slot.param.device}"
            )
        shape = tuple(slot.param.shape)
        missing = {"step", "eta", "mu", "ax"} - slot.state.keys()
        if missing:
            raise KeyError(f"state: {sorted(missing)} missing for a param of shape {shape}")
        got = tuple(slot.state["ax"].shape)
        if not _broadcasts(shape, got):
            raise ValueError(
                f"state: 'ax' of shape {got} does not match its param of shape {shape}"
            )
    for _, pairs in groupby(left, key=_what_torch_takes_together):
        groups, slots = zip(*pairs, strict=True)
        grads = [_grad_of(slot) for slot in slots]
        if unscale != 1:
            grads = [grad * unscale for grad in grads]
        if _is_own(groups[0]):
            for slot, grad in zip(slots, grads, strict=True):
                _step_one_by_torch(groups[0], slot, grad)
            continue
        options = {name: groups[0][name] for name in _HYPERPARAMETERS}
        options["t0"] = slots[0].state.get("t0", options["t0"])
        if slots[0].state["ax"].dtype != slots[0].param.dtype or not all(map(_goes_foreach, slots)):
            options["foreach"] = False
        torch_asgd(
            [slot.param for slot in slots],
            grads,
            [slot.state["ax"] for slot in slots],
            [slot.state["mu"] for slot in slots],
            [slot.state["eta"] for slot in slots],
            [slot.state["step"] for slot in slots],
            has_complex=any(slot.param.is_complex() for slot in slots),
            **options,
        )


def _goes_foreach(slot: Slot) -> bool:
    """Whether torch's foreach takes a param with its scalars where they are."""
    return (
        _FOREACH_TAKES_HOST_SCALARS
        or not slot.param.is_cuda
        or all(slot.state[name].is_cuda for name in _state.SCALARS)
    )


def _is_own(group: Group) -> bool:
    """Whether a group has hyperparameters that torch's function does not know."""
    return any(group[name] != value for name, value in OWN_HYPERPARAMETERS.items())


def _what_torch_takes_together(pair: _Left) -> tuple[Any, ...]:
    group, slot = pair
    ax, t0 = slot.state.get("ax"), slot.state.get("t0")
    return id(group), isinstance(ax, Tensor) and ax.dtype != slot.param.dtype, t0


def _step_one_by_torch(group: Group, slot: Slot, grad: Tensor) -> None:
    """Update a param by torch's own function, with scalars that torch would not compute."""
    state, param = slot.state, slot.param
    options = {name: group[name] for name in _HYPERPARAMETERS}
    lr, lambd, alpha = (float(group[name]) for name in ("lr", "lambd", "alpha"))
    step, eta, mu = (float(state[name]) for name in ("step", "eta", "mu"))
    t0 = float(state["t0"] if "t0" in state else group["t0"])
    is_current = group["lr_schedule"] == "current"
    every = group["average_every"]
    if is_current:
        eta, _ = next_scalars(step, lr, lambd, alpha, t0, every, is_current)
        if step <= t0:
            options["lambd"] = 0.0
    ax = state["ax"] if mu != 0 else torch.empty_like(param)
    torch_asgd(
        [param],
        [grad],
        [ax],
        [torch.tensor(mu or 1.0, dtype=torch.float64)],
        [torch.tensor(eta, dtype=torch.float64)],
        [torch.tensor(step, dtype=torch.float64)],
        has_complex=param.is_complex(),
        **{**options, "foreach": False},
    )
    eta, mu = next_scalars(step + 1, lr, lambd, alpha, t0, every, is_current)
    for name, value in (("step", step + 1), ("eta", eta), ("mu", mu)):
        state[name].fill_(value)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether torch adds a tensor of one shape to one of the other, in place."""
    try:
        return bool(torch.broadcast_shapes(shape, to) == to)
    except RuntimeError:
        return False


def _check_graph_capture(optimizer: ASGD) -> None:
    """Refuse what torch refuses in the capture of a device graph."""
    if hasattr(optimizer, "_accelerator_graph_capture_health_check"):
        optimizer._accelerator_graph_capture_health_check()
    else:  # before torch 2.9
        optimizer._cuda_graph_capture_health_check()
