"""Every private name of torch that is used, its versions, and what happens without it."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch._C import (
    _is_tracing,  # of all versions
    _len_torch_dispatch_stack,  # 2.4 and later
    _len_torch_function_stack,  # 2.4 and later
)
from torch._C._autograd import _profiler_enabled  # 2.4 and later
from torch._C._functorch import peek_interpreter_stack  # 2.4 and later
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.fx.experimental.proxy_tensor import get_proxy_mode  # 2.4 and later
from torch.nn.utils import parametrize
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import FrameType

_VERSION = torch.torch_version.TorchVersion(torch.__version__)

# As factors of tensors on a GPU; before 2.7 torch's loop over params takes them instead.
FOREACH_TAKES_HOST_SCALARS = _VERSION >= "2.7"

_COUNTS_LISTS = _VERSION >= "2.5"  # whether `increment_version` takes a list

# Where the elements of a DTensor stand, and the tensor that it wraps, in all versions: `to_local`
# is part of autograd's graph. Several are asked for in the step of each param.
spec_of = attrgetter("_spec")
local_tensor = attrgetter("_local_tensor")


def has_observers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks or a profiler are to see the step of an optimizer."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    )


def call_post_hooks(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Call what is to be called after the step of an optimizer."""
    for hooks in (optimizer._optimizer_step_post_hooks, _global_optimizer_post_hooks):
        for hook in hooks.values():
            hook(optimizer, args, kwargs)


def is_watched() -> bool:
    """Whether a mode or transform of torch is to see every operation, so that none is left out."""
    return (
        _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _is_tracing()
        or (_len_torch_function_stack() > 0 and get_proxy_mode() is not None)
    )


def recorder() -> str | None:
    """Return the name of what records torch's own operations at the moment, and misses others."""
    if _is_tracing():
        return "torch.jit.trace"
    has_modes = _len_torch_dispatch_stack() or _len_torch_function_stack()
    return "make_fx" if has_modes and get_proxy_mode() is not None else None


def is_asked_for_state() -> bool:
    """Whether the step is the one by which ``torch.distributed.checkpoint`` has state made.

    It sets lr and gradients to 0 for that step, which a user's own first one may also have.
    """
    return _is_checkpointing("_init_optim_state")  # of all versions; without, steps count


def is_asked_by_checkpoint() -> bool:
    """Whether ``torch.distributed.checkpoint`` is taking the state dict of an optimizer."""
    return _is_checkpointing("_get_optim_state_dict")  # of all versions; without, it is not seen


def is_persistent(module: torch.nn.Module, name: str) -> bool:
    """Whether a buffer of a module is in its state dict."""
    return name not in module._non_persistent_buffers_set  # of all versions


def check_graph_capture(optimizer: Any) -> None:
    """Refuse what torch refuses in the capture of a device graph."""
    if hasattr(optimizer, "_accelerator_graph_capture_health_check"):  # 2.9 and later
        optimizer._accelerator_graph_capture_health_check()
    else:
        optimizer._cuda_graph_capture_health_check()


def increment_versions(tensors: list[torch.Tensor]) -> None:
    """Tell autograd that tensors have changed, so that it refuses a backward through old values."""
    if _COUNTS_LISTS:
        increment_version(tensors)
    else:
        for tensor in tensors:
            increment_version(tensor)


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return numbers that grow when tensors are written in place; those of inference have none."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def forget_copies() -> None:
    """Let the next forward of each model read the params, where torch has kept copies of them.

    Autocast keeps them in other dtypes, `parametrize.cached` what was computed from them, and
    `fully_shard` the params gathered from all ranks.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()
    composable = sys.modules.get("torch.distributed._composable_state")  # where fully_shard is used
    for module in [] if composable is None else list(composable._module_state_mapping):
        if hasattr(module, "_get_fsdp_state"):  # of all versions that have fully_shard
            _reshard(module._get_fsdp_state())


def _reshard(state: Any) -> None:
    """Let a module of `fully_shard` forget its gathered params, as its `reshard` may not do.

    That leaves alone what is still being gathered, for a forward to come, and what a forward has
    that raised an exception. All ranks are alike in both.
    """
    groups = getattr(state, "_fsdp_param_groups", None)  # some versions have one
    for group in [state._fsdp_param_group] if groups is None else groups:
        if group is not None:
            with group.use_training_state(type(group._training_state).IDLE):
                group.wait_for_unshard()
                group.reshard()


def are_flattened(params: Iterable[torch.Tensor]) -> bool:
    """Whether some are parts of a FullyShardedDataParallel module, which keeps copies of them."""
    return "torch.distributed.fsdp" in sys.modules and any(
        getattr(param, "_fsdp_flattened", False) for param in params
    )


def redundancy_around() -> Any:
    """Return the ZeroRedundancyOptimizer that is making an optimizer just now; else None.

    It leaves nothing in the optimizer by which this could be known later.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    frame = _frame_of(module.ZeroRedundancyOptimizer._init_local_optimizer)  # of all versions
    return None if frame is None else frame.f_locals["self"]


def share_params(redundancy: Any) -> None:
    """Let a ZeroRedundancyOptimizer send the params of each rank to all others."""
    redundancy._sync_params()  # of all versions


def _is_checkpointing(function: str) -> bool:
    """Whether a function of ``torch.distributed.checkpoint.state_dict`` is running."""
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    caller = getattr(module, function, None)
    return caller is not None and _frame_of(caller) is not None


def _frame_of(function: Any) -> FrameType | None:
    """Return the innermost frame in which a function is running; None if it is not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


_version = attrgetter("_version")
