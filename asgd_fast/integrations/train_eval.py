"""ASGD for loops that tell the optimizer when they evaluate: those of transformers and accelerate.

Neither is imported: both call ``eval()`` and ``train()`` of any optimizer that has them. This
module does not know how a step is made.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast import ASGD
from asgd_fast._torch import averages
from asgd_fast._torch.averaging import refuse_flattened
from asgd_fast._torch.internals import forget_copies, versions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from asgd_fast._torch.state import ParamState

__all__ = ["TrainEvalASGD"]

# What checkpoints of eval mode have besides torch's keys, where an average stands in a param.
_ITERATE = "iterate"


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
    bit for bit, though the model was saved with the averages. ``load_state_dict`` then puts the
    averages into the params and waits for ``train()``; model and optimizer may be loaded in either
    order. Other optimizers ignore these entries and would go on from the averages.

    ``train()`` takes back what was written into the params since ``eval()``. ``eval()`` leaves
    params alone that were written since the last step: that is how the best weights, which a
    Trainer loads at the end, stay what is evaluated.

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

    def eval(self) -> None:
        """Put the averages into the params; nothing happens if they stand there.

        Params whose averages have not begun stay as they are; if none has, there is an
        `AveragingNotBegunWarning`, once for each optimizer. If somebody else has written into
        params since the last step, all of them stay as they are, with a warning.

        Raises
        ------
        RuntimeError
            The params are parts of a ``FullyShardedDataParallel`` module, or others stand in their
            place in the groups.
        """
        if self._settings.iterates or self._settings.is_exchanged:
            return
        refuse_flattened("eval", self._params())
        self._refuse_replaced("eval")
        begun = self._begun("eval", stacklevel=4)
        if self._settings.versions not in ([], versions_of(self._params())):
            self._settings.warn_once(
                UserWarning,
                "eval: the params were written since the last step, as best weights are that a "
                "trainer loads at the end; they are left as they are. To evaluate averages of "
                "params that you change after steps, use averaged_parameters()",
                stacklevel=3,
            )
            return
        self._put_averages(begun, {own.param: own.param for own in begun})

    def train(self) -> None:
        """Put the iterates back into the params; nothing happens if they stand there.

        Raises
        ------
        RuntimeError
            The averages have traded places with the params since: see `averaged_parameters`.
        """
        if self._settings.iterates:
            self._settings.refuse_exchanged("train")
            self._put_back()

    @contextmanager
    def averaged_parameters(
        self, *, model: torch.nn.Module | None = None, update_bn: Iterable[Any] | None = None
    ) -> Iterator[None]:
        """Hold the averages in the params for as long as the context lasts: see `ASGD`."""
        self._begun("averaged_parameters", stacklevel=5)  # from the block's `with`
        settings = self._settings
        are_of_step = settings.versions == versions_of(self._params())
        try:
            with super().averaged_parameters(model=model, update_bn=update_bn):
                yield
        finally:
            if are_of_step:  # the params are what they were before
                settings.versions = versions_of(self._params())

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, as `ASGD` does; in eval mode with the iterates in it.

        Returns
        -------
        dict
            For ``load_state_dict`` of this class; in train mode of `ASGD` and torch's, too.
        """
        state_dict = super().state_dict()
        for i, param in enumerate(self._params()):
            if param in self._settings.iterates and i in state_dict["state"]:
                entry = state_dict["state"][i]
                state_dict["state"][i] = {**entry, _ITERATE: self._settings.iterates[param]}
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
            As `ASGD`; or an iterate is no tensor of the shape of its param. Nothing is changed.
        """
        plain, iterates = self._split(state_dict)
        super().load_state_dict(plain)
        self._settings.iterates.clear()
        self._settings.versions.clear()
        self._put_averages(self._records(), iterates)

    def _split(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[Tensor, Tensor]]:
        """Return a checkpoint without iterates, and these by param."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        param_of = dict(zip(keys, self._params(), strict=False))  # another length is refused later
        state, iterates = {}, {}
        for key, entry in state_dict["state"].items():
            state[key] = entry
            if isinstance(entry, dict) and _ITERATE in entry:
                state[key] = {name: x for name, x in entry.items() if name != _ITERATE}
                if key in param_of:
                    name = f"state[{key!r}]['{_ITERATE}']"
                    iterates[param_of[key]] = _checked(name, entry[_ITERATE], param_of[key])
        return {**state_dict, "state": state}, iterates

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
    def _put_averages(self, states: list[ParamState], iterates: dict[Tensor, Tensor]) -> None:
        """Keep copies of iterates, and put the averages in the place of their params."""
        kept = {p: torch.empty_like(p).copy_(iterate) for p, iterate in iterates.items()}
        self._settings.iterates.update(
            kept
        )  # before anything is written, for `train` after interrupts
        averages.copy_to(states, [(param, param) for param in kept])
        forget_copies()
        self._settings.redundancy.share()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _put_back(self) -> None:
        for param, iterate in self._settings.iterates.items():
            param.copy_(iterate)
        forget_copies()
        self._settings.redundancy.share()
        self._settings.iterates.clear()
        self._settings.versions = versions_of(self._params())


def _checked(name: str, iterate: Any, param: Tensor) -> Tensor:
    if not isinstance(iterate, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(iterate).__name__}")
    if iterate.shape != param.shape:
        raise ValueError(
            f"{name}: shape {tuple(iterate.shape)} does not match its param of shape "
            f"{tuple(param.shape)}"
        )
    return iterate
