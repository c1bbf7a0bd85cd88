"""The torch optimizer: ``from asgd_fast import ASGD`` in place of ``from torch.optim import ASGD``.

This module knows what torch's programs do with an optimizer. It does not know how the state is kept
nor how the pass over the memory is made; what no engine takes goes to torch's own ``asgd``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from asgd_fast import _core
from asgd_fast._engines import launches_for
from asgd_fast._torch import checkpoints, fallback
from asgd_fast._torch.averaging import WithAverages
from asgd_fast._torch.gather import Work, gather
from asgd_fast._torch.groups import Group, check_group, drop_usual, make_plain
from asgd_fast._torch.internals import (
    call_post_hooks,
    check_graph_capture,
    has_observers,
    increment_versions,
    is_asked_for_state,
)
from asgd_fast._torch.redundancy import has_parameters
from asgd_fast._torch.settings import KEYWORDS, Settings, checked_average_dtype, shared
from asgd_fast._torch.state import put_unstepped
from asgd_fast.schedule import AveragingKind, LrSchedule
from asgd_fast.threads import threads_for

if TYPE_CHECKING:
    from asgd_fast.cuda.launch import Launches

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
        if not (args or kwargs):
            return step(self)
        result = step(self, *args, **kwargs)
        call_post_hooks(self, (self, *args), kwargs)  # which a closure may have registered
        return result

    wrapper.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it again
    return wrapper


class ASGD(WithAverages, torch.optim.ASGD):
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
        Average each so many-th iterate only, from the first one of the average on; the m-th of them
        has the weight mu = 1 / m. The other steps have mu = 0 and do not touch the average.
    averaging : {"mean", ("ema", decay), ("polynomial", power)}, default="mean"
        The weights of the iterates in the average, by the mu of the m-th of them::

            mu = 1 / m                                        "mean"
            mu = (1 - decay) / (1 - decay ** m)               ("ema", decay)
            mu = (power + 1) / (m + power)                    ("polynomial", power)

        With "ema", an exponential moving average, an iterate loses the factor `decay` with each
        later one, 1e-6 <= decay <= 1: about the last 1 / (1 - decay) of them count. With
        "polynomial" the weight of the i-th grows as i ** power, 0 <= power <= 1e6. Whatever it is,
        averaging begins as `t0` says.
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
        The groups; hyperparameters may be changed between steps. lr_schedule, average_every and
        averaging are among them where they are not the defaults, so that checkpoints have torch's
        keys.
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
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992); polynomial
    weights: Shamir and Zhang, "Stochastic gradient descent for non-smooth optimization" (2013).

    The one pass is made over tensors of the CPU or of CUDA devices, of float32, float64, float16,
    bfloat16, complex64 or complex128, whose elements fill a block of memory, in any order of the
    axes; and over the parts of DTensors, where param, gradient and average are laid out alike. Half
    types are computed in float32 and rounded once. Everything else, and tensors that share memory
    with each other, go to torch's own ``asgd``, with its results and its speed.

    Where ``torch.distributed.checkpoint`` makes a step before the first one, so that the optimizer
    makes its state, the state is made and the step does not count.

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

    lazy_average: bool = shared("lazy_average")
    average_dtype: torch.dtype | None = shared("average_dtype", checked_average_dtype)
    fused_amp: bool = shared("fused_amp")

    # A GradScaler that finds it set leaves the unscaling and skipping to the step.
    _step_supports_amp_scaling: bool = shared("fused_amp")

    _settings_class: type[Settings] = Settings

    @_uncompiled
    def __init__(
        self,
        params: ParamsT,
        lr: SupportsFloat = 1e-2,
        lambd: SupportsFloat = 1e-4,
        alpha: SupportsFloat = 0.75,
        t0: SupportsFloat = 1e6,
        weight_decay: SupportsFloat = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        lazy_average: bool = True,
        average_dtype: torch.dtype | str | None = None,
        lr_schedule: LrSchedule = "torch",
        average_every: SupportsIndex = 1,
        averaging: AveragingKind = "mean",
        fused_amp: bool = False,
    ) -> None:
        self._settings = self._settings_class(
            lazy_average=lazy_average,
            average_dtype=checked_average_dtype(average_dtype),
            fused_amp=fused_amp,
            own_defaults={
                "lr_schedule": lr_schedule,
                "average_every": average_every,
                "averaging": averaging,
            },
        )
        # Torch takes more kinds of numbers than its hints say.
        scalars: tuple[Any, Any, Any, Any, Any] = (lr, lambd, alpha, t0, weight_decay)
        super().__init__(params, *scalars, foreach, maximize, differentiable, capturable)
        self.register_state_dict_post_hook(checkpoints.pack)

    def __repr__(self) -> str:
        """Name the settings that are not the usual ones, and the hyperparameters of each group."""
        settings = "".join(f"\n{name}: {value}" for name, value in self._settings.unusual().items())
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
        self.defaults: dict[str, Any] = {**self.defaults, **self._settings.own_defaults}
        if isinstance(param_group, dict):
            for name in param_group.keys() & set(KEYWORDS):
                hint = ""
                if self._settings.redundancy.wrapper() is not None:  # which writes it into groups
                    hint = f"; give ZeroRedundancyOptimizer functools.partial(ASGD, {name}=...)"
                raise TypeError(
                    f"{name}: is set for the optimizer as a whole, not for a group{hint}"
                )
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._settings.had_parameters |= has_parameters(self.param_groups[-1]["params"])
        make_plain(self.param_groups[-1])
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
            lambd, alpha, t0, lr_schedule, average_every or averaging was changed to what the
            constructor refuses; or lr or weight_decay, of which steps take any number as torch's
            do, to what is none. Nothing is changed.
        """
        if torch.compiler.is_compiling():
            return _step_uncompiled(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        settings = self._settings
        settings.refuse_exchanged("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if settings.is_stepping:  # between this look and the next line no thread gets the GIL
            raise RuntimeError("step: another thread is making a step of this optimizer")
        settings.is_stepping = True
        try:
            self._update()
        finally:
            settings.is_stepping = False
        return loss

    def _update(self) -> None:
        """Make the step with the gradients that there are, unless a GradScaler skips it."""
        checkpoints.take_loaded(self)
        if not self.state and is_asked_for_state():
            put_unstepped(self.state, self.param_groups, self._settings)
        elif self._settings.fused_amp:
            self._update_scaled()
        else:
            self._run(gather(self.state, self.param_groups, self._settings))

    def _update_scaled(self) -> None:
        """Make the step with what a GradScaler sets on the optimizer for its time, if it does."""
        scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        if isinstance(found_inf, Tensor) and found_inf.is_cuda:
            # From now on the device has the scalars, as it alone knows whether it made a step.
            self._settings.scalars_on_device = True
            work = gather(self.state, self.param_groups, self._settings)
            if work.has_all_scalars_on_device() and not work.remaining:
                if work.rows.device_rows is not None:
                    work.rows.device_rows.scale(work.rows.streams, found_inf, scale)
                self._run(work)
                return
            work.end()
        if found_inf is None or not found_inf:
            unscale = 1.0 if scale is None else _inverse(scale)
            self._run(gather(self.state, self.param_groups, self._settings, unscale))

    def _run(self, work: Work) -> None:
        """Do what a step has to do, all of it checked before anything changes."""
        try:
            rows, remaining, launches = work.rows, work.remaining, None
            if remaining:
                check_graph_capture(self)
            if rows.has_gpu_rows:
                capturable = all(group["capturable"] for group in self.param_groups)
                launches = launches_for(rows, capturable=capturable)
            if remaining:
                fallback.prepare(remaining)
            n_threads = threads_for(rows)
            increment_versions(work.written)
            # One call, as an interrupt may come wherever Python code runs.
            if remaining or launches is not None:
                _core.update(rows, n_threads, partial(self._begin, work, launches))
            else:
                _core.update(rows, n_threads, work.begin)
        finally:
            work.end()

    def _begin(self, work: Work, launches: Launches | None) -> None:
        """Begin a step with what torch's own function and GPUs do of it."""
        work.begin()
        if work.remaining:
            # Not set_grad_enabled: an interrupt between its making and its entering leaves it set.
            with torch.enable_grad() if self.defaults["differentiable"] else torch.no_grad():
                fallback.step(work.remaining, work.unscale)
        if launches is not None:
            launches.run()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or another process needs."""
        self._settings.refuse_exchanged("copying the optimizer")
        return {**super().__getstate__(), **self._settings.copied()}

    @_uncompiled
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, a copy or another process."""
        is_copy = not hasattr(self, "_settings")
        if is_copy:
            self._settings = self._settings_class()
        state = dict(state)
        self._settings.take(state)
        own = checkpoints.unpack(state["state"], state["param_groups"], self._settings)
        before = dict(self.__dict__)
        try:
            super().__setstate__({**state, "state": {}})  # type: ignore[no-untyped-call]
            if is_copy:  # hooks are not copied
                self.register_state_dict_post_hook(checkpoints.pack)
            self.state = own
        except BaseException:  # an interrupt, or no memory
            self.__dict__.update(before)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, in torch's form.

        Averages are those of the state, or copies of the params before they begin. step, eta and mu
        are those of the state if somebody has looked into it, else copies. Inside
        `averaged_parameters` it is the same checkpoint, with a warning: the model then saves its
        averages, and neither has the iterate to go on from. So take a checkpoint to resume from
        outside.

        Where `start_averaging` found params of different step counts, the group's t0 is changed in
        its last bits, and "step" and "mu" tell where the average of each began. With another
        `averaging` than "mean" that "mu" is next to 0, so that torch's optimizer leaves the iterate
        of its first step out of the average.

        Returns
        -------
        dict
            For ``load_state_dict`` of this class and of ``torch.optim.ASGD``.
        """
        if self._settings.is_exchanged:
            self._settings.warn_once(
                UserWarning,
                "state_dict: called inside averaged_parameters(), where the params of the model "
                "are the averages; a checkpoint with both has lost the iterate, from which "
                "training goes on. To resume, save outside of it; to ship the averages, save "
                "averaged_state_dict(model)",
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer stood, of this class or ``torch.optim.ASGD``.

        As in torch; but the state is copied, step, eta and mu keep their precision, and averages
        get the dtype that they have in this optimizer. Where `lr_schedule`, `average_every` and
        `averaging` are not in the checkpoint, as in torch's and where they were the defaults, they
        stay. A warning tells of averages that were made with others than then hold.

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
        self._settings.refuse_exchanged("load_state_dict")
        # Added last, so that the user's own hooks see the dict that they were given.
        hook = self.register_load_state_dict_pre_hook(checkpoints.check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group in self.param_groups:
            checkpoints.warn_of_lost_settings(group, self._records(group))


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
