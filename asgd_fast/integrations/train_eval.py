"""ASGD for loops that tell the optimizer when they evaluate: those of transformers and accelerate.

Neither is imported: both call ``eval()`` and ``train()`` of any optimizer that has them. This
module does not know how a step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast import ASGD
from asgd_fast._torch import averages
from asgd_fast._torch.averaging import refuse_flattened
from asgd_fast._torch.checkpoints import check_memory
from asgd_fast._torch.internals import forget_copies, is_asked_by_checkpoint, versions_of
from asgd_fast._torch.settings import Settings

if TYPE_CHECKING:
    from asgd_fast._torch.state import ParamState

__all__ = ["TrainEvalASGD"]

# What checkpoints of eval mode have besides torch's keys, where an average stands in a param. Other
# optimizers step on from the averages and save both as they were: then the steps differ.
_ITERATE = "iterate"
_STEP = "iterate_step"


class _Settings(Settings):
    """The settings of an optimizer with modes.

    Attributes
    ----------
    iterates : dict of Tensor to Tensor
        What is to be put back into params where averages stand: none in train mode.
    versions : list of int
        Those of the params that there were in the last step, after it; empty where not known.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.iterates: dict[Tensor, Tensor] = {}
        self.versions: list[int] = []


class TrainEvalASGD(ASGD):
    """`asgd_fast.ASGD` with the averages in the params from ``eval()`` to ``train()``.

    ``transformers.Trainer`` calls ``eval()`` before each evaluation and ``train()`` before each
    training step, without a callback; so does who writes ``optimizer.eval()`` and
    ``optimizer.train()`` in a loop of accelerate or of their own. Evaluations, and the weights that
    are saved after them, are then those of the averages, once these have begun. Such loops call
    these methods of every optimizer that has them. Therefore they are not `ASGD`'s: who has only
    changed an import finds their iterates in the model.

    Unlike ``averaged_parameters()``, this outlives the optimizer: the params stay what they are
    when it goes. It takes memory of the size of the params whose averages have begun, as the
    gradients do in training. Everything else, arguments included, is as in `ASGD`.

    Buffers stay as they are: with batch normalization, the running statistics are those of the
    iterates, in evaluations too. Call ``torch.optim.swa_utils.update_bn`` before you ship a model.

    Notes
    -----
    In eval mode ``state_dict()`` has an "iterate" for each such param, from which training goes on,
    bit for bit, though the model was saved with the averages, and an "iterate_step", the number of
    steps made. ``load_state_dict`` then puts the averages into the params and waits for
    ``train()``; model and optimizer may be loaded in either order. Other optimizers ignore these
    entries and would go on from the averages; once they have made a step, so does this one.

    ``train()`` takes back what was written into the params since ``eval()``, except by
    ``copy_averages_to(model)``. After ``start_averaging()`` they keep the averages of before until
    then. ``eval()`` leaves params alone that were written since the last step: that is how the best
    weights, which a Trainer loads at the end, stay what is evaluated.

    Examples
    --------
    >>> import torch
    >>> from asgd_fast.integrations.train_eval import TrainEvalASGD
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = TrainEvalASGD([weight], lr=1.0, lambd=0.0, t0=-1)
    >>> for _ in range(3):
    ...     weight.grad = torch.ones(1)
    ...     optimizer.step()
    >>> optimizer.eval()
    >>> weight.item()
    -2.0
    >>> optimizer.train()
    >>> weight.item()
    -3.0
    """

    _settings: _Settings
    _settings_class = _Settings

    def eval(self) -> None:
        """Put the averages into the params; nothing happens if they stand there.

        Params whose averages have not begun stay as they are; if none has, there is an
        `AveragingNotBegunWarning`, once for each optimizer. If somebody else has written into
        params since the last step, all of them stay as they are, with a warning.

        Raises
        ------
        RuntimeError
            The params are parts of a ``FullyShardedDataParallel`` module, or others stand in their
            place in the groups; or the optimizer is in a ``ZeroRedundancyOptimizer``.
        """
        self._refuse_redundancy("eval")
        if self._settings.iterates or self._settings.is_exchanged:
            return
        refuse_flattened("eval", self._params())
        self._refuse_replaced("eval")
        begun = self._begun("eval")
        if not self._are_of_step():
            self._settings.warn_once(
                UserWarning,
                "eval: the params were written since the last step, as best weights are that a "
                "trainer loads at the end; they are left as they are. To evaluate averages of "
                "params that you change after steps, use averaged_parameters()",
            )
            return
        self._put_averages(
            begun, {record.param: _copied(record.param, record.param) for record in begun}
        )

    def train(self) -> None:
        """Put the iterates back into the params; nothing happens if they stand there.

        Raises
        ------
        RuntimeError
            The averages have traded places with the params since: see `averaged_parameters`; or the
            optimizer is in a ``ZeroRedundancyOptimizer``.
        """
        self._refuse_redundancy("train")
        if self._settings.iterates:
            self._settings.refuse_exchanged("train")
            self._put_back()

    @contextmanager
    def _exchanged(
        self,
        begun: list[ParamState],
        model: torch.nn.Module | None = None,
        update_bn: Iterable[Any] | None = None,
    ) -> Iterator[None]:
        settings = self._settings
        are_of_step = self._are_of_step()
        try:
            with super()._exchanged(begun, model, update_bn):
                yield
        finally:
            if are_of_step:  # the params are what they were before
                settings.versions = versions_of(self._params()[: len(settings.versions)])

    def copy_averages_to(self, target: torch.nn.Module | Iterable[Tensor]) -> None:
        """Copy the averages into a model, or into tensors: see `ASGD`.

        In eval mode, params that are among these keep their averages in train mode, too.
        """
        params = list(self._settings.iterates)
        before = versions_of(params)
        super().copy_averages_to(target)
        for param, old, new in zip(params, before, versions_of(params), strict=True):
            if new != old:
                del self._settings.iterates[param]

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, as `ASGD` does; in eval mode with the iterates in it.

        Returns
        -------
        dict
            For ``load_state_dict`` of this class; in train mode of `ASGD` and torch's, too.

        Raises
        ------
        RuntimeError
            In eval mode, if ``torch.distributed.checkpoint`` asks, as by
            ``get_optimizer_state_dict``: it would lose the iterates.
        """
        if self._settings.iterates and is_asked_by_checkpoint():
            raise RuntimeError(
                "state_dict: torch.distributed.checkpoint loads what the optimizer that loads has, "
                "and would lose the iterates of eval mode; call train() first"
            )
        state_dict = super().state_dict()
        for i, param in enumerate(self._params()):
            if param in self._settings.iterates and i in state_dict["state"]:
                entry = state_dict["state"][i]
                iterate = {_ITERATE: self._settings.iterates[param], _STEP: float(entry["step"])}
                state_dict["state"][i] = {**entry, **iterate}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer stood, in the mode in which that was.

        A checkpoint of train mode leaves the params as they are: the model's has the iterates.

        Parameters
        ----------
        state_dict : dict
            What ``state_dict()`` of this class, of `ASGD` or of ``torch.optim.ASGD`` returned.

        Raises
        ------
        KeyError, TypeError, ValueError, RuntimeError
            As `ASGD`; or an iterate is no dense tensor of the shape of its param, or complex where
            that is real, or its average has another shape. Nothing is changed.
        """
        plain, iterates, made = self._split(state_dict)
        if iterates:
            self._refuse_redundancy("load_state_dict")
        super().load_state_dict(plain)
        for record in self._records():
            if made.get(record.param) not in (None, float(record.scalars()[0])):
                del iterates[record.param]
        self._settings.iterates.clear()
        self._settings.versions.clear()
        self._put_averages(self._records(), iterates)

    def _split(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, Tensor], dict[Tensor, Any]]:
        """Return a checkpoint without iterates, and by param copies of these and their steps."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        param_of = dict(zip(keys, self._params(), strict=False))  # another length is refused later
        state, iterates, made = {}, {}, {}
        for key, entry in state_dict["state"].items():
            state[key] = entry
            if isinstance(entry, dict) and _ITERATE in entry:
                state[key] = {name: x for name, x in entry.items() if name not in (_ITERATE, _STEP)}
                if key in param_of:
                    param, ax = param_of[key], entry.get("ax")
                    if isinstance(ax, Tensor) and ax.shape != param.shape:  # a step would broadcast
                        raise ValueError(
                            f"state[{key!r}]['ax']: expected the shape of its param, "
                            f"{tuple(param.shape)}, got {tuple(ax.shape)}"
                        )
                    name = f"state[{key!r}]['{_ITERATE}']"
                    iterates[param] = _checked_copy(name, entry[_ITERATE], param)
                    made[param] = entry.get(_STEP)
        return {**state_dict, "state": state}, iterates, made

    def _refuse_redundancy(self, call: str) -> None:
        if self._settings.redundancy.wrapper() is not None:
            raise RuntimeError(
                f"{call}: is not possible in a ZeroRedundancyOptimizer, of which each rank has the "
                "averages of some params only; use averaged_parameters(), on all ranks"
            )

    def _are_of_step(self) -> bool:
        """Whether nobody is known to have written into the params since the last step."""
        known = self._settings.versions
        return versions_of(self._params()[: len(known)]) == known  # others were added since

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._settings.iterates:
            raise RuntimeError(
                "step: the averages stand in the params since eval(); call train() before the "
                "gradients are computed"
            )
        loss = super()._step(closure)
        self._settings.versions = versions_of(self._params())
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or another process needs."""
        if self._settings.iterates:
            raise RuntimeError("copying the optimizer: is not possible after eval(); call train()")
        return super().__getstate__()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _put_averages(self, records: list[ParamState], kept: dict[Tensor, Tensor]) -> None:
        """Put the averages in the place of params of which the iterates are kept."""
        try:
            self._settings.iterates.update(kept)
            averages.copy_to(records, [(param, param) for param in kept])
        except BaseException:  # an interrupt, too
            self._put_back()
            raise
        forget_copies()

    def _put_back(self) -> None:
        try:
            self._copy_back()
        finally:
            self._copy_back()  # what an interrupt has left

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copy_back(self) -> None:
        if not self._settings.iterates:
            return
        for param, iterate in self._settings.iterates.items():
            param.copy_(iterate)
        forget_copies()
        self._settings.versions = []
        self._settings.iterates.clear()
        self._settings.versions = versions_of(self._params())


def _checked_copy(name: str, iterate: Any, param: Tensor) -> Tensor:
    if not isinstance(iterate, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(iterate).__name__}")
    if iterate.shape != param.shape:
        raise ValueError(
            f"{name}: shape {tuple(iterate.shape)} does not match its param of shape "
            f"{tuple(param.shape)}"
        )
    check_memory(name, iterate, param)
    if iterate.is_complex() and not param.is_complex():
        raise TypeError(f"{name}: expected real numbers, got a tensor of {iterate.dtype}")
    return _copied(iterate, param)


@torch.inference_mode(False)
@torch.no_grad()
def _copied(tensor: Tensor, param: Tensor) -> Tensor:
    """Return a copy in the layout, the dtype and the place of a param."""
    return torch.empty_like(param).copy_(tensor)
