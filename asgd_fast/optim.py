"""The torch optimizer: ``from asgd_fast import ASGD`` in place of ``from torch.optim import ASGD``.

This module knows what torch's programs do with an optimizer. It does not know how the state is kept
nor how the pass over the memory is made; what no engine takes goes to torch's own ``asgd``.
"""

from __future__ import annotations

from functools import wraps
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.optim.asgd import asgd as torch_asgd
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from asgd_fast import _core, _state
from asgd_fast._slots import Slot, Slots, check_group
from asgd_fast._state import Group, rounds_scalars
from asgd_fast._table import Table
from asgd_fast.threads import threads_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim.optimizer import ParamsT

__all__ = ["ASGD"]


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step as torch does, with hooks and a profiler range, when there are any.

    Torch's own wrapper takes 7 us, more than a step of few small params.
    """
    in_full = torch.optim.Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: ASGD, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return in_full(self, *args, **kwargs)
        return step(self, *args, **kwargs)

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
    differentiable, capturable : bool, default=False
        As in torch, by torch's own implementation.
    lazy_average : bool, default=True
        Until averaging begins, an average equals its param: ``state[p]["ax"]`` is then the param's
        own memory, which costs none and is not written to. The first step that averages gives it
        memory of its own. False gives it that from the first step on, as torch does. Not kept in
        checkpoints, which hold copies either way.

    Attributes
    ----------
    param_groups : list of dict
        The groups; hyperparameters may be changed between steps.
    state : dict of Tensor to dict
        For each param that has been stepped: "ax", its average, in its dtype and layout; "step",
        "eta" and "mu", tensors of no dimension. All are updated in place by the steps.

    Raises
    ------
    TypeError, ValueError
        As ``torch.optim.ASGD``; and for what that lets through: lambd, alpha or t0 that is not
        finite, negative lambd or alpha.

    See Also
    --------
    asgd_fast.ArrayASGD : the same without torch.

    Notes
    -----
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).

    The one pass is made over CPU tensors of float32, float64, float16, bfloat16, complex64 or
    complex128 whose elements fill a block of memory, in any order of the axes. Half types are
    computed in float32 and rounded once. Everything else, and tensors that share memory with each
    other, go to torch's own ``asgd``, with its results and its speed.

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
    >>> bool((optimizer.state[model.weight]["ax"] - 1.0).abs().max() < 0.05)
    True
    """

    # GradScaler then sets grad_scale and found_inf, and leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    _slots: Slots | None = None

    # Whether averages with memory of their own came from elsewhere, which lazy ones can give up.
    _may_release = False

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
    ) -> None:
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
        self.lazy_average = lazy_average

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
        """
        if torch.compiler.is_compiling():
            return _step_uncompiled(self, closure)
        return self._step(closure)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or another process needs."""
        return {**super().__getstate__(), "lazy_average": self.lazy_average}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, a copy or another process."""
        _state.put_back(state.get("state", {}))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._may_release = self.lazy_average
        with torch.inference_mode(False):
            self._slots = _state.find(self.state, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, as torch does: its tensors are those of the state.

        Averages that have no memory of their own are copied.

        Returns
        -------
        dict
            For ``load_state_dict`` of this class and of ``torch.optim.ASGD``.
        """
        # Before the user's own hooks.
        hook = self.register_state_dict_post_hook(_state.separated, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer stood, of this class or ``torch.optim.ASGD``.

        As in torch; but the state is copied, and step, eta and mu keep their precision.

        Parameters
        ----------
        state_dict : dict
            What ``state_dict()`` returned, in any version of torch.

        Raises
        ------
        ValueError
            It has other groups, or other numbers of params in them.
        """
        # Added last, so that the user's own hooks see the dict that they were given.
        hook = self.register_load_state_dict_pre_hook(_state.copied)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = self.__dict__  # by a scaler, and taken away after the step
        if given.get("found_inf") is None or not given["found_inf"]:
            scale = given.get("grad_scale")
            try:
                table = _spare_tables.pop()
            except IndexError:
                table = Table(("params[{}]", "grads[{}]", "averages[{}]"))
            try:
                self._update(table, 1.0 if scale is None else _inverse(scale))
            finally:
                table.clear()
                _spare_tables.append(table)
        return loss

    def _update(self, table: Table, unscale: float) -> None:
        """Update every param that has a gradient, by an engine as far as it goes."""
        slots, left = self._gather(table, unscale)
        if left:
            _check_graph_capture(self)
            if any(_grad_of(slot).is_sparse for _, slot in left):
                raise RuntimeError("ASGD does not support sparse gradients")
            left = self._fit(left, slots, table, unscale)
        try:
            table.check_overlap()
        except ValueError:
            # The order of operations shows where memory is shared: it is to be torch's.
            left = self._active(slots)
        if left:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                _step_by_torch(left, unscale)
        if table:
            n_threads = threads_for(table)
            # Before the memory changes: nothing fails from here on.
            _increment_versions(slots.written)
            _core.update(table, n_threads)
        if self._may_release:
            self._may_release = False
            _state.release(self.state, self.param_groups)
            self._slots = _state.find(self.state, self.param_groups, slots)

    def _gather(self, table: Table, unscale: float) -> tuple[Slots, list[_Left]]:
        """Put into the table what an engine can take as it is; return the rest."""
        slots = self._slots
        is_watched = _is_watched()
        if slots is None or not slots.is_current(self.state) or is_watched:
            slots = self._read_slots()
        if is_watched:
            return slots, self._active(slots)
        left = slots.gather(table, self.param_groups, unscale, rounds_scalars())
        if left is None:  # a first gradient, or groups or state that were changed by hand
            table.clear()
            slots = self._read_slots()
            left = slots.gather(table, self.param_groups, unscale, rounds_scalars())
        if left is None:
            raise RuntimeError("param_groups: changed by another thread during the step")
        return slots, left

    def _read_slots(self) -> Slots:
        """Find the state of each param, new where there was none."""
        with torch.inference_mode(False):  # which the state is to outlive
            _state.create(self.state, self.param_groups, lazy=self.lazy_average)
            slots = _state.find(self.state, self.param_groups, self._slots)
            _state.own(slot for slot in chain(*slots.groups) if slot is not None and _begins(slot))
            self._slots = _state.find(self.state, self.param_groups, slots)
        return self._slots

    def _active(self, slots: Slots) -> list[_Left]:
        """Return every param that has a gradient."""
        return [
            (group, slot)
            for group, own in zip(self.param_groups, slots.groups, strict=True)
            for slot in own
            if slot is not None and slot.param.grad is not None
        ]

    def _fit(self, left: list[_Left], slots: Slots, table: Table, unscale: float) -> list[_Left]:
        """Put into the table what an engine can take once converted; return the rest."""
        if _is_watched():
            return left
        rest = []
        outside: list[Tensor | None] = []  # of the table, and yet read or written
        for group, slot in left:
            grad = None
            if slot.packed and not (group["differentiable"] or group["capturable"]):
                grad = _converted_grad(slot)
            if grad is not None and slots.add(table, group, slot, grad, unscale, rounds_scalars()):
                outside.append(slot.param.grad)
            else:
                rest.append((group, slot))
                outside += slot.param, slot.param.grad, slot.state.get("ax")
        if any(table.touches(*_extent(tensor)) for tensor in outside):
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

# Between steps their memory waits here for the next.
_spare_tables: list[Table] = []

# Under torch.compile the step is left as it is: faster than what would be compiled.
_step_uncompiled = torch.compiler.disable(ASGD._step)


def _is_watched() -> bool:
    """Whether a mode or transform of torch is to see every operation, so that none is left out."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _begins(slot: Slot) -> bool:
    """Whether the next step is the first that averages."""
    return slot.is_lazy and float(slot.state["mu"]) != 1


def _inverse(grad_scale: Any) -> float:
    """Return the factor that ``GradScaler.unscale_`` multiplies by: a float32."""
    return float(
        torch.as_tensor(grad_scale, dtype=torch.float64, device="cpu").reciprocal().float()
    )


def _grad_of(slot: Slot) -> Tensor:
    grad = slot.param.grad
    assert grad is not None
    return grad


def _extent(tensor: Tensor | None) -> tuple[int, int]:
    """Return where the memory of a tensor begins and ends; (0, 0) if it has no address."""
    if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return 0, 0
    if tensor.numel() == 0:
        return 0, 0
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a subclass that only wraps others
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


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
    stays = slot.is_lazy or ax.dtype != param.dtype or ax.shape != param.shape
    if not stays and ax.stride() != param.stride():
        if ax.untyped_storage().nbytes() != ax.numel() * ax.itemsize:
            return None  # it is part of something larger
        ax.data = torch.empty_like(param).copy_(ax)
    return like.copy_(grad)


def _step_by_torch(left: list[_Left], unscale: float) -> None:
    """Update params by torch's own function."""
    _state.own(slot for _, slot in left)
    for _, slot in left:
        shape = tuple(slot.param.shape)
        missing = {"step", "eta", "mu", "ax"} - slot.state.keys()
        if missing:
            raise KeyError(f"state: {sorted(missing)} missing for a param of shape {shape}")
        got = tuple(slot.state["ax"].shape)
        if not _broadcasts(shape, got):
            raise ValueError(
                f"state: 'ax' of shape {got} does not match its param of shape {shape}"
            )
    for _, pairs in groupby(left, key=lambda pair: id(pair[0])):
        groups, slots = zip(*pairs, strict=True)
        grads = [_grad_of(slot) for slot in slots]
        if unscale != 1:
            grads = [grad * unscale for grad in grads]
        torch_asgd(
            [slot.param for slot in slots],
            grads,
            [slot.state["ax"] for slot in slots],
            [slot.state["mu"] for slot in slots],
            [slot.state["eta"] for slot in slots],
            [slot.state["step"] for slot in slots],
            has_complex=any(slot.param.is_complex() for slot in slots),
            **{name: groups[0][name] for name in _HYPERPARAMETERS},
        )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether torch adds a tensor of one shape to one of the other, in place."""
    try:
        return bool(torch.broadcast_shapes(shape, to) == to)
    except RuntimeError:
        return False


def _increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that tensors have changed, so that it refuses a backward through old values."""
    if _VERSIONS_IN_ONE_CALL:
        increment_version(tensors)
    else:
        for tensor in tensors:
            increment_version(tensor)


def _takes_lists() -> bool:
    try:
        increment_version([])
    except Exception:
        return False
    return True


# Since torch 2.5.
_VERSIONS_IN_ONE_CALL = _takes_lists()


def _check_graph_capture(optimizer: ASGD) -> None:
    """Refuse what torch refuses in the capture of a device graph."""
    if hasattr(optimizer, "_accelerator_graph_capture_health_check"):
        optimizer._accelerator_graph_capture_health_check()
    else:  # before torch 2.9
        optimizer._cuda_graph_capture_health_check()
