"""Averages in Lightning: from the start of each validation to its end, and in its checkpoints.

This module knows Lightning's hooks and what an optimizer's users call; it knows nothing of steps.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from asgd_fast import ASGD, NonMonotonicTrigger
from asgd_fast._torch import batch_norm

try:
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
except ImportError as error:
    raise ImportError(
        "asgd_fast.integrations.lightning needs the packages of the lightning extra; in a clone "
        "of asgd_fast: pip install '.[lightning]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import LightningModule, Trainer

__all__ = ["ASGDWeightAveraging"]

# Where checkpoints keep the iterate, as those of Lightning's own WeightAveraging do.
_ITERATE = "current_model_state"

# Each rank has parts of the params alone, or steps copies of them.
_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class ASGDWeightAveraging(Callback):
    """Validates, saves and leaves behind the averages of each `asgd_fast.ASGD` of a module.

    They stand in the module from the start of each validation to its end, once they have begun:
    while it is fitted, in the middle of an epoch and in the sanity check, too. Afterwards, and
    after an exception, the iterates are back, bit for bit. When training ends the module gets the
    averages for good, so that ``trainer.test`` and ``trainer.predict`` use them.

    The "state_dict" of a checkpoint holds the averages, so that ``load_from_checkpoint`` gives
    them, as does ``trainer.test(ckpt_path="best")``; the iterate goes beside it, and
    ``trainer.fit(ckpt_path=...)`` goes on from there, bit for bit. For files of
    ``ModelCheckpoint(save_weights_only=True)`` Lightning calls no callbacks: they hold iterates.

    Parameters
    ----------
    monitor : str, optional
        A metric that is logged in validation, less where the module is better: averaging begins
        when it stalls (NT-ASGD), as `NonMonotonicTrigger` decides, in the ranks together. Give the
        optimizer a t0 then that the run does not reach, such as its default.
    patience : int, default=5
        For the trigger: how many of the latest validations do not count as better ones yet.
    update_bn : bool, default=False
        Before each validation, and for the module that is left behind, compute the running
        statistics of batch normalization for the averages: in one pass over the training data in
        training mode, with a batch, or the first element of one, as the input of ``forward``.
        Training goes on with its own statistics, and random numbers.

    Attributes
    ----------
    trigger : NonMonotonicTrigger or None

    Raises
    ------
    TypeError, ValueError
        `patience` is no integer, or negative. In ``trainer.fit``: no optimizer is an
        `asgd_fast.ASGD`.
    RuntimeError
        In ``trainer.fit``: the strategy shards the params (FSDP, FSDP2, DeepSpeed); `monitor` is
        not logged; or `update_bn` finds several data loaders, or one with persistent workers, of
        which a second pass would stop the first.

    Examples
    --------
    ::

        trainer = Trainer(max_epochs=10, callbacks=[ASGDWeightAveraging()])
        trainer.fit(module, loader, validation_loader)
    """

    def __init__(
        self, monitor: str | None = None, patience: int = 5, *, update_bn: bool = False
    ) -> None:
        self.monitor = monitor
        self.update_bn = update_bn
        self._averaging = _Together()
        self.trigger = None if monitor is None else NonMonotonicTrigger(self._averaging, patience)
        self._inside = ExitStack()  # of averaged_parameters(), of each optimizer
        self._is_inside = False
        self._iterate: dict[str, Any] | None = None  # once the module holds the averages for good
        self._statistics: dict[str, torch.Tensor] = {}  # of batch normalization, of the averages
        self._step_of_statistics = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with nothing of an earlier training."""
        if stage == TrainerFn.FITTING:
            self._averaging.optimizers = []
            self._iterate = None
            self._statistics = {}
            self._step_of_statistics = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers."""
        if isinstance(trainer.strategy, _SHARDING):
            raise RuntimeError(
                "strategy: expected one that keeps the whole module on each rank, such as ddp, "
                f"got {type(trainer.strategy).__name__}"
            )
        found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ASGD)]
        if not found:
            names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise TypeError(f"optimizers: expected an asgd_fast.ASGD among them, got {names}")
        self._averaging.optimizers = found
        if self.trigger is not None and trainer.world_size > 1:
            self.trigger.process_group = torch.distributed.group.WORLD
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                rank_zero_warn(
                    "ModelCheckpoint(save_weights_only=True) saves the iterates and not the "
                    "averages, since Lightning calls no callbacks for it"
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the module."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._enter(pl_module, None if trainer.sanity_checking else trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the iterates back, and let the trigger decide."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._leave()
        if self.trigger is None or self.trigger.has_fired or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise RuntimeError(
                f"monitor: {self.monitor!r} is not logged; there are "
                f"{sorted(trainer.callback_metrics)}"
            )
        self.trigger.step(trainer.callback_metrics[self.monitor])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the iterates back."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the iterates back."""
        self._leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averages in the module for good."""
        is_averaging = self._averaging.is_averaging
        if is_averaging:
            self._iterate = deepcopy(pl_module.state_dict())
        for optimizer in self._averaging.optimizers:
            optimizer.copy_averages_to(pl_module)  # which warns if there are none
        if is_averaging and self.update_bn:
            if self._step_of_statistics != trainer.global_step:
                self._update_statistics(pl_module, trainer)
            self._put_statistics(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the averages into the checkpoint, and the iterate beside them."""
        if self._iterate is not None:
            checkpoint[_ITERATE] = self._iterate
        elif self._is_inside:  # somebody saves from within a validation
            averaged = deepcopy(checkpoint["state_dict"])
            self._leave()
            checkpoint[_ITERATE] = deepcopy(pl_module.state_dict())
            checkpoint["state_dict"] = averaged
            self._enter(pl_module)
        elif self._averaging.is_averaging:
            iterate = checkpoint["state_dict"]
            averages = self._averaging.averages()
            averaged = {**iterate, **{k: x for k, x in self._statistics.items() if k in iterate}}
            for name, param in pl_module.named_parameters(remove_duplicate=False):
                if name in iterate and param in averages:
                    averaged[name] = averages[param].to(param.dtype)
            checkpoint["state_dict"], checkpoint[_ITERATE] = averaged, iterate

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the iterate, if training is to go on."""
        if trainer.state.fn == TrainerFn.FITTING and _ITERATE in checkpoint:
            # The module has loaded the averages already.
            if self.update_bn:
                self._statistics = _statistics(pl_module)
            pl_module.load_state_dict(checkpoint[_ITERATE], strict=pl_module.strict_loading)

    def state_dict(self) -> dict[str, Any]:
        """Return what the trigger needs to go on."""
        return {} if self.trigger is None else {"trigger": self.trigger.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another callback stood."""
        if self.trigger is not None and "trigger" in state_dict:
            self.trigger.load_state_dict(state_dict["trigger"])

    def _enter(self, pl_module: LightningModule, trainer: Trainer | None = None) -> None:
        """Put averages into the module, and with a trainer compute their statistics."""
        if not self._averaging.is_averaging:
            return
        model = pl_module if self.update_bn else None
        with ExitStack() as stack:
            for optimizer in self._averaging.optimizers:
                if optimizer.is_averaging:
                    stack.enter_context(optimizer.averaged_parameters(model=model))
            if self.update_bn and trainer is not None:
                self._update_statistics(pl_module, trainer)
            self._put_statistics(pl_module)
            self._inside = stack.pop_all()
        self._is_inside = True

    def _leave(self) -> None:
        self._is_inside = False
        self._inside.close()

    def _update_statistics(self, pl_module: LightningModule, trainer: Trainer) -> None:
        """Compute the statistics of batch normalization for what stands in the module."""
        loader = trainer.train_dataloader
        if isinstance(loader, (dict, list, tuple)):
            raise RuntimeError(
                f"update_bn: expected one training data loader, got a {type(loader).__name__}"
            )
        if getattr(loader, "persistent_workers", False):
            raise RuntimeError(
                "update_bn: expected a training data loader without persistent_workers, whose only "
                "iterator training is using"
            )
        n = trainer.num_training_batches
        with isolate_rng(), trainer.precision_plugin.forward_context():
            batches = islice(loader, int(n) if isfinite(n) else None)  # draws random numbers
            batch_norm.update_statistics(pl_module, batches)
        self._statistics = _statistics(pl_module)
        for statistic in self._statistics.values():
            if statistic.is_floating_point():  # the mean over the batches of all ranks
                statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))
        self._step_of_statistics = trainer.global_step

    @torch.no_grad()
    def _put_statistics(self, pl_module: LightningModule) -> None:
        for name, buffer in pl_module.named_buffers():
            if name in self._statistics:
                buffer.copy_(self._statistics[name])


class _Together:
    """The optimizers of a training, as the trigger sees them: as one."""

    def __init__(self) -> None:
        self.optimizers: list[ASGD] = []

    @property
    def is_averaging(self) -> bool:
        return any(optimizer.is_averaging for optimizer in self.optimizers)

    def averages(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return the average of each param."""
        return {
            param: average
            for optimizer in self.optimizers
            for param, average in zip(
                (param for group in optimizer.param_groups for param in group["params"]),
                optimizer.averages,
                strict=True,
            )
        }

    def start_averaging(self) -> None:
        for optimizer in self.optimizers:
            optimizer.start_averaging()


@torch.inference_mode(False)
def _statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the running statistics of batch normalization, by name."""
    return {
        f"{path}.{name}" if path else name: buffer.clone()
        for path, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
        for name, buffer in module.named_buffers(recurse=False)
    }
