"""The torch optimizer: ``from asgd_fast import ASGD`` in place of ``from torch.optim import ASGD``.

This module knows what torch's programs do with an optimizer. It does not know how the state is kept
nor how the pass over the memory is made; what no engine takes goes to torch's own ``asgd``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgd_fast import _core
from asgd_fast._engines import launches_for
from asgd_fast._torch import averages, batch_norm, checkpoints, fallback, state
from asgd_fast._torch.conversions import copy_as
from asgd_fast._torch.gather import Work, gather
from asgd_fast._torch.groups import Group, check_group, drop_usual
from asgd_fast._torch.internals import (
    are_flattened,
    call_post_hooks,
    check_graph_capture,
    forget_copies,
    has_observers,
    increment_versions,
    is_watched,
)
from asgd_fast._torch.scalars import floats
from asgd_fast._torch.settings import KEYWORDS, Settings, Shared, checked_average_dtype
from asgd_fast.schedule import AveragingNotBegunWarning, check_place
from asgd_fast.threads import threads_for

if TYPE_CHECKING:
    from asgd_fast._torch.state import ParamState

__all__ = ["ASGD"]

F = TypeVar("F", bound="Callable[..., Any]")


def _uncompiled(function: F) -> F:
    """Leave a function as it is where ``torch.compile`` would take it apart."""
    uncompiled: F = torch.compiler.disable(function)
    return uncompiled


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step as torch does, with hooks and a profiler range, when there are any.

    Torch's own wrapper takes 7 us, more than a step of few small params. Observers other than the
    profiler, such as ``ExecutionTraceObserver``, miss the range.
    """
    in_full = torch.optim.Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: ASGD, *args: Any, **kwargs: Any) -> Any:
        if has_observers(self):
            return in_full(self, *args, **kwargs)
        result = step(self, *args, **kwargs)
        if args or kwargs:  # a closure may have registered hooks
            call_post_hooks(self, (self, *args), kwargs)
        return result

    wrapper.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it again
    return wrapper


class ASGD(torch.optim.ASGD):
    r"""Averaged SGD with the bits of ``torch.optim.ASGD(foreach=False)``, in one pass over memory.

    Arguments, defaults, messages, hooks, state and checkpoints are those of ``torch.optim.ASGD``,
    of which this is a subclass. For each param p with its gradient g and its average ax, every line
    rounded once::

        g = g / loss_scale              if fused_amp, under a GradScaler
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
        Until averaging begins, an average equals its param and does not exist: ``state[p]["ax"]``
        answers a copy of the param, and there is no such key. The step that makes the first iterate
        of the average allocates it. False does that in the first step, as torch does. Not kept in
        checkpoints, which hold averages either way.
    average_dtype : torch.dtype or str, optional
        float32 or float64, or its name: averages are kept in it where it is wider than their
        params (complex ones as pairs of such numbers), and the lines of ax above are computed in
        it. By default they are kept in the dtype of their params, as in torch; there they stop
        moving when their changes become too small for it. Not kept in checkpoints, whose averages
        are converted. Like `lazy_average` and `fused_amp`, it holds for all groups.
    lr_schedule : {"torch", "current"}, default="torch"
        "current" makes eta follow lr at once, and makes the steps before averaging begins those of
        ``torch.optim.SGD(lr, weight_decay=weight_decay)``, bit for bit in float32 and float64. In
        the step that follows k steps::

            eta = lr, and no decay of p                              if k <= t0
            eta = lr / (1 + lambd * lr * (k - t0)) ** alpha          otherwise

    average_every : int, default=1
        Average each so many-th iterate only, from the first one of the average on; the m-th has the
        weight mu = 1 / m. The other steps have mu = 0 and do not touch the average.
    fused_amp : bool, default=False
        Let the step do what a ``torch.amp.GradScaler`` otherwise does before it, as in torch's
        fused optimizers: it divides by the scale as it reads the gradients, which stay scaled, and
        is called, with its hooks, for gradients with an infinity or nan, too, where it changes
        nothing. That saves a pass over the gradients, and on a GPU a wait of the host. What looks
        at gradients between backward and the next one must not mind the scale, and what counts
        calls of the step must not count on those that changed something.

    Attributes
    ----------
    param_groups : list of dict
        The groups; hyperparameters may be changed between steps. lr_schedule and average_every are
        among them where they are not the defaults, so that checkpoints have torch's keys.
    state : dict of Tensor to dict
        For each param that has been stepped: "step", "eta" and "mu", tensors of no dimension, of
        which the last two are for the next step; and "ax", its average, in its layout, once that
        has begun. All are updated in place by the steps. "t0", a number, stands instead of the
        group's where `start_averaging` found params of different step counts; alone, for a param
        that had made none.
    averages : list of Tensor
        The averages, in the order of the groups; copies of the params before they begin.
    is_averaging : bool
        Whether any average has begun.

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
    axes; and over the parts of DTensors, where param, gradient and average are laid out alike. Half
    types are computed in float32 and rounded once. Everything else, and tensors that share memory
    with each other, go to torch's own ``asgd``, with its results and its speed.

    A first step in which lr and all gradients are 0, by which ``torch.distributed.checkpoint`` has
    optimizers make their state, makes it without counting.

    The GIL is released while memory is updated, and the memory of a tensor must not be replaced or
    resized meanwhile by another thread (``p.data = other``).

    Frameworks wrap optimizers in subclasses of their class. Such a wrapper has the same keywords,
    and is refused the same inside `averaged_parameters`, as the optimizer itself.

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

    lazy_average = Shared[bool]("lazy_average")
    average_dtype = Shared["torch.dtype | None"]("average_dtype")
    fused_amp = Shared[bool]("fused_amp")

    # A GradScaler that finds it set leaves the unscaling and skipping to the step.
    _step_supports_amp_scaling = Shared[bool]("fused_amp")

    _is_exchanged = Shared[bool]("is_exchanged")

    @_uncompiled
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
        average_dtype: torch.dtype | str | None = None,
        lr_schedule: str = "torch",
        average_every: int = 1,
        fused_amp: bool = False,
    ) -> None:
        self._own = Settings()
        self._own.lazy_average = lazy_average
        self._own.average_dtype = checked_average_dtype(average_dtype)
        self._own.fused_amp = fused_amp
        self._own.own_defaults = {"lr_schedule": lr_schedule, "average_every": average_every}
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
        self._make_checkpoints_plain()

    def __repr__(self) -> str:
        """Name the settings that are not the usual ones, and the hyperparameters of each group."""
        settings = "".join(f"\n{name}: {value}" for name, value in self._own.unusual().items())
        return super().__repr__().replace("(", f"({settings}", 1)

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
        self.defaults = {**self.defaults, **self._own.own_defaults}
        if isinstance(param_group, dict):
            for name in param_group.keys() & set(KEYWORDS):
                raise TypeError(f"{name}: is set for the optimizer as a whole, not for a group")
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        drop_usual(self.param_groups[-1])

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
            A gradient is sparse; or the averages stand in the params: see `averaged_parameters`; or
            another thread is in a step of this optimizer. Nothing is changed.
        TypeError, ValueError
            A hyperparameter was changed to what the constructor refuses. Nothing is changed.
        """
        if torch.compiler.is_compiling():
            return _step_uncompiled(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._refuse_exchanged("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = self._own
        if own.is_stepping:  # between this look and the next line no other thread gets the GIL
            raise RuntimeError("step: another thread is making a step of this optimizer")
        own.is_stepping = True
        try:
            self._update()
        finally:
            own.is_stepping = False
        return loss

    def _update(self) -> None:
        """Make the step with the gradients that there are, unless a GradScaler skips it."""
        own, scale, found_inf = self._own, None, None
        if not self.state and not is_watched() and state.is_for_state(self.param_groups):
            lazy, dtype = own.lazy_average, own.average_dtype
            state.prepare(self.state, self.param_groups, lazy=lazy, average_dtype=dtype)
            return
        if own.fused_amp:  # a GradScaler sets these for the step, and takes them away
            scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        if isinstance(found_inf, Tensor) and found_inf.is_cuda:
            # From now on the device has the scalars, as it alone knows whether it made a step.
            own.scalars_on_device = True
            work = self._gather(1.0)
            if work.has_all_scalars_on_device() and not work.left:
                if work.rows.on_device is not None:
                    work.rows.on_device.scale(work.rows.streams, found_inf, scale)
                self._run(work, 1.0)
                return
        if found_inf is None or not found_inf:
            unscale = 1.0 if scale is None else _inverse(scale)
            self._run(self._gather(unscale), unscale)

    def _gather(self, unscale: float) -> Work:
        """Find out what the step has to do; nothing is changed but where scalars are."""
        own = self._own
        return gather(
            self.state,
            self.param_groups,
            unscale=unscale,
            scalars_on_device=own.scalars_on_device,
            by_torch=is_watched(),
            lazy=own.lazy_average,
            average_dtype=own.average_dtype,
        )

    def _run(self, work: Work, unscale: float) -> None:
        """Do what a step has to do, all of it checked before anything changes."""
        launches = None
        if work.left:
            check_graph_capture(self)
        if work.rows.has_gpu_rows:
            capturable = all(group["capturable"] for group in self.param_groups)
            launches = launches_for(work.rows, capturable=capturable)
        if work.left:
            fallback.prepare(work.left)
        n_threads = threads_for(work.rows)
        work.begin()
        try:
            if work.left:
                with torch.set_grad_enabled(self.defaults["differentiable"]):
                    fallback.step(work.left, unscale)
            increment_versions(work.written)
            if launches is not None:
                launches.run()
            _core.update(work.rows, n_threads)
        finally:
            work.end()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or another process needs."""
        self._refuse_exchanged("copying the optimizer")
        return {**super().__getstate__(), **self._own.copied()}

    @_uncompiled
    def __setstate__(self, state_: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, a copy or another process."""
        if not hasattr(self, "_own"):  # a copy
            self._own = Settings()
        state_ = dict(state_)
        self._own.take(state_)
        own = checkpoints.unpack(
            state_["state"],
            state_["param_groups"],
            lazy=self.lazy_average,
            average_dtype=self.average_dtype,
        )
        super().__setstate__({**state_, "state": {}})  # type: ignore[no-untyped-call]
        self.state = own
        self._make_checkpoints_plain()

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, in torch's form.

        Averages are those of the state, or copies of the params before they begin. step, eta and mu
        are those of the state if somebody has looked into it, else copies. Inside
        `averaged_parameters` it is the same checkpoint, with a warning: the model then saves its
        averages, and neither has the iterate to go on from. So take a checkpoint to resume from
        outside.

        Where `start_averaging` found params of different step counts, the group's t0 is changed in
        its last bits, and "step" and "mu" tell where the average of each began.

        Returns
        -------
        dict
            For ``load_state_dict`` of this class and of ``torch.optim.ASGD``.
        """
        if self._is_exchanged:
            self._warn_once(
                UserWarning,
                "state_dict: called inside averaged_parameters(), where the params of the model "
                "are the averages; a checkpoint with both has lost the iterate, from which "
                "training goes on. To resume, save outside of it; to ship the averages, save "
                "averaged_state_dict(model)",
                stacklevel=3,
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer stood, of this class or ``torch.optim.ASGD``.

        As in torch; but the state is copied, step, eta and mu keep their precision, and averages
        get the dtype that they have in this optimizer. Where `lr_schedule` and `average_every` are
        not in the checkpoint, as in torch's and where they were the defaults, they stay.

        Parameters
        ----------
        state_dict : dict
            What ``state_dict()`` returned, in any version of torch.

        Raises
        ------
        KeyError, TypeError, ValueError
            It has other groups, or other numbers of params in them; or an entry of it is missing,
            or is not what it may be. Nothing is changed.
        RuntimeError
            The averages stand in the params: see `averaged_parameters`.
        """
        self._refuse_exchanged("load_state_dict")
        # Added last, so that the user's own hooks see the dict that they were given.
        hook = self.register_load_state_dict_pre_hook(checkpoints.check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    @contextmanager
    def averaged_parameters(
        self, *, model: torch.nn.Module | None = None, update_bn: Iterable[Any] | None = None
    ) -> Iterator[None]:
        """Hold the averages in the params for as long as the context lasts, to evaluate the model.

        They trade places in one pass; the params keep their memory, and get their bits back on the
        way out, after an exception too. A param whose averaging has not begun stays as it is; if
        none has, there is an `AveragingNotBegunWarning`, once for each optimizer. Models wrapped by
        ``fully_shard`` are resharded on both ways, so that they gather what stands in the params.
        Averages that are wider than their params, and those that no engine takes, need memory of
        the size of the params meanwhile.

        Inside, steps are refused; a CUDA graph that is replayed does not ask. Do not write into the
        params there: it would go into the averages, or be lost. `state_dict` gives what it gives
        outside; ``model.state_dict()`` holds the averages.

        Parameters
        ----------
        model : Module, optional
            Its buffers get their bits back on the way out, whatever becomes of them inside, as
            where ``torch.optim.swa_utils.update_bn(loader, model)`` is called there. Without it
            buffers are not touched.
        update_bn : iterable of Tensor, or of list or tuple, optional
            Training data. Inside, the running statistics of batch normalization in `model` are then
            those of the averages, computed by torch's ``update_bn``: in one pass in training mode,
            with a batch, or the first element of one, as the input of `model`, on its device. Left
            out while no average has begun.

        Yields
        ------
        None

        Raises
        ------
        RuntimeError
            The averages stand in the params already, or the params are parts of a
            ``FullyShardedDataParallel`` module, which may have copies of them. Nothing is changed.
        TypeError
            `model` is no Module, or missing where there is `update_bn`. Nothing is changed.
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
        batch_norm.check_model(model, update_bn)
        self._refuse_exchanged("averaged_parameters")
        self._refuse_flattened("averaged_parameters", self._params())
        begun = self._begun("averaged_parameters", stacklevel=5)  # from the block's `with`
        try:
            self._is_exchanged = True
            with averages.exchanged(begun), batch_norm.kept_buffers(model):
                if model is not None and update_bn is not None and begun:
                    batch_norm.update_statistics(model, update_bn)
                yield
        finally:
            try:
                self._is_exchanged = False
            finally:
                self._is_exchanged = False  # after an interrupt, too

    def copy_averages_to(self, target: torch.nn.Module | Iterable[Tensor]) -> None:
        """Copy the averages into a model, or into tensors.

        A param whose averaging has not begun is copied itself; if none has, there is an
        `AveragingNotBegunWarning`, once for each optimizer.

        Parameters
        ----------
        target : Module or iterable of Tensor
            The model that is trained, whose params are overwritten by their averages for good. Or
            another model: its parameters go by name where the optimizer was given names, whether
            or not one of the two models is in a wrapper, such as of ``torch.compile``; else they
            must be, in their order, those of its only group. Or tensors, one for each param in the
            order of the groups. Values are rounded to the dtypes of the target.

        Raises
        ------
        TypeError
            `target` is neither.
        ValueError
            It has another number of tensors than the optimizer, other names or other shapes; or it
            is not clear which belongs to which. Nothing is changed.
        RuntimeError
            The parameters of the target are parts of a ``FullyShardedDataParallel`` module, which
            may have copies of them. Nothing is changed.

        See Also
        --------
        averaged_state_dict : finds the params in any model, by names.
        """
        params = self._params()
        targets: list[Any]
        forget_copies()
        if isinstance(target, torch.nn.Module):
            targets = self._params_in(target, params)
        else:
            targets = list(target) if hasattr(target, "__iter__") else [None]
            if isinstance(target, Tensor) or not all(isinstance(x, Tensor) for x in targets):
                raise TypeError(
                    "target: expected a torch.nn.Module or an iterable of tensors, got "
                    f"{type(target).__name__}"
                )
        self._refuse_flattened("copy_averages_to", targets)
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
        begun = self._begun("copy_averages_to", stacklevel=4)
        averages.copy_to(begun, zip(params, targets, strict=True))

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
            begun, and the rest of the model as it is. If none has, there is an
            `AveragingNotBegunWarning`, once for each optimizer. The names are those of the model
            inside of ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``. Running
            statistics of batch normalization are those of the iterates, unless it is called inside
            ``averaged_parameters(model=model, update_bn=loader)``.

        Raises
        ------
        ValueError
            The model has none of the optimizer's params.
        RuntimeError
            The params are parts of a ``FullyShardedDataParallel`` module, which may have copies of
            them.

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
        own = set(map(id, self._params()))
        forget_copies()
        if not any(id(param) in own for param in model.parameters()):
            raise ValueError("model: has none of the optimizer's params")
        self._refuse_flattened("averaged_state_dict", self._params())
        self._begun("averaged_state_dict", stacklevel=4)
        with nullcontext() if self._is_exchanged else self.averaged_parameters():
            return _uncompiled(averages.shipped)(model)  # compiled, its copy would be empty

    @property
    def averages(self) -> list[Tensor]:
        """The averages, one for each param in the order of the groups.

        Each is the tensor that the steps update in place, in the dtype of its param or
        `average_dtype`. Until averaging begins a copy of the param stands for it, which an average
        equals until then, unless ``lazy_average=False`` has made it. Inside `averaged_parameters`
        it is detached from the param, and shares its memory, if that has its dtype.
        """
        own = {own.param: own for own in self._states()}
        return [
            averages.average_of(own[param])
            if param in own
            else copy_as(param, state.wide(param, self.average_dtype))
            for param in self._params()
        ]

    @property
    def is_averaging(self) -> bool:
        """Whether the average of any param has begun."""
        return bool(averages.begun(self._states()))

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
        groups = self.param_groups
        if group is not None:
            groups = [groups[check_place("group", group, len(groups))]]
        for own in groups:
            state.start(self.state, own, self._states(own))

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

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _begun(self, call: str, *, stacklevel: int) -> list[ParamState]:
        """Return the states whose averages have begun, for a call that asks for averages."""
        states = self._states()
        begun = averages.begun(states)
        step = 0.0 if begun else max(floats([own.scalars()[0] for own in states]), default=0)
        if step:
            t0 = min(float(group["t0"]) for group in self.param_groups)
            self._warn_once(
                AveragingNotBegunWarning,
                f"{call}: no average has begun, as t0 is {t0:g} and the number of steps is "
                f"{step:g}; these are the params as they are. start_averaging() begins with the "
                "next step; or choose a smaller t0",
                stacklevel,
            )
        return begun

    def _warn_once(self, category: type[Warning], message: str, stacklevel: int) -> None:
        if category not in self._own.warned:
            warnings.warn(message, category, stacklevel)
            self._own.warned.add(category)

    def _states(self, *groups: Group) -> list[ParamState]:
        """Return the states that there are of the params of some groups, by default of all."""
        return state.states_of(
            self.state,
            groups or self.param_groups,
            lazy=self.lazy_average,
            average_dtype=self.average_dtype,
        )

    def _make_checkpoints_plain(self) -> None:
        """Let checkpoints have torch's form, before the user's own hooks see them."""
        if not self._own.has_plain_checkpoints:  # of a copy: hooks are not copied
            self.register_state_dict_post_hook(checkpoints.pack, prepend=True)
            self._own.has_plain_checkpoints = True

    def _refuse_exchanged(self, call: str) -> None:
        if self._is_exchanged:
            raise RuntimeError(
                f"{call}: is not possible inside averaged_parameters(), where the averages stand "
                "in the params"
            )

    def _refuse_flattened(self, call: str, params: list[Tensor]) -> None:
        if are_flattened(params):
            raise RuntimeError(
                f"{call}: the params are parts of a FullyShardedDataParallel module, whose next "
                "forward may read copies of them; use torch.distributed.fsdp.fully_shard instead, "
                "or take the averages from FullyShardedDataParallel.optim_state_dict(model, "
                "optimizer)['state'][name]['ax']"
            )

    def _params_in(self, model: torch.nn.Module, params: list[Tensor]) -> list[Tensor]:
        """Return the parameter of a model that belongs to each of the optimizer's."""
        others: list[Tensor] = list(model.parameters())
        if {id(param) for param in params} <= {id(other) for other in others}:
            return params
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if len(names) == len(params):
            return averages.params_named(model, names)
        if len(self.param_groups) > 1:
            raise ValueError(
                "target: it is not clear which of its parameters belong to which of the "
                f"{len(self.param_groups)} groups; give the optimizer named_parameters(), or load "
                "averaged_state_dict() into it"
            )
        return others


@_uncompiled
def _step_uncompiled(optimizer: ASGD, closure: Callable[[], Any] | None) -> Any:
    """Make a step as it is, which is faster than what would be compiled."""
    for group in optimizer.param_groups:
        # The compiler sets it where a compiled function changes a group. On the CPU it is refused.
        if group["capturable"] and all(p.device.type == "cpu" for p in group["params"]):
            group["capturable"] = False
    return optimizer._step(closure)


def _inverse(grad_scale: Any) -> float:
    """Return the factor that ``GradScaler.unscale_`` multiplies by: a float32."""
    scale = torch.as_tensor(grad_scale, dtype=torch.float64, device="cpu")
    return float(scale.reciprocal().float())
