"""What users ask of the averages of a torch optimizer, apart from making steps.

This module knows models and what their users expect; it knows neither steps nor how memory trades
places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast._torch import averages, batch_norm, checkpoints, state
from asgd_fast._torch.conversions import copy_as
from asgd_fast._torch.internals import are_flattened, forget_copies
from asgd_fast._torch.redundancy import has_parameters
from asgd_fast._torch.scalars import floats
from asgd_fast.schedule import AveragingNotBegunWarning, check_place

if TYPE_CHECKING:
    from collections import defaultdict

    from asgd_fast._torch.groups import Group
    from asgd_fast._torch.settings import Settings
    from asgd_fast._torch.state import ParamState


class WithAverages:
    """The methods of an optimizer that have to do with its averages."""

    if TYPE_CHECKING:  # else who resolves the hints of the class would look for these names
        param_groups: list[Group]
        state: defaultdict[Tensor, Any]
        _settings: Settings

    @contextmanager
    def averaged_parameters(
        self, *, model: torch.nn.Module | None = None, update_bn: Iterable[Any] | None = None
    ) -> Iterator[None]:
        """Hold the averages in the params for as long as the context lasts, to evaluate the model.

        They trade places in one pass; the params keep their memory, and get their bits back on the
        way out, after an exception too. A param whose averaging has not begun stays as it is; if
        none has, there is an `AveragingNotBegunWarning`, once for each optimizer. Models wrapped by
        ``fully_shard`` are resharded on both ways, so that they gather what stands in the params;
        under ``ZeroRedundancyOptimizer`` the ranks send each other what they step on both ways, so
        that all must enter and leave. Averages that are wider than their params, and those that no
        engine takes, need memory of the size of the params meanwhile.

        Inside, steps are refused; a CUDA graph that is replayed does not ask. Do not write into the
        params there: it would go into the averages, or be lost. A param whose ``data`` is replaced
        there gets the bits of its iterate in the new memory. `state_dict` gives what it gives
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
            The averages stand in the params already; or the params are parts of a
            ``FullyShardedDataParallel`` module, which may have copies of them; or other tensors
            stand in their place in the groups, as DeepSpeed's ZeRO has it; or the memory of a param
            or an average was taken away. Nothing is changed. Also where that is done inside, on the
            way out: all other params have their bits back then.
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
        self._settings.refuse_exchanged("averaged_parameters")
        refuse_flattened("averaged_parameters", self._params())
        self._refuse_replaced("averaged_parameters")
        with self._exchanged(self._begun("averaged_parameters"), model, update_bn):
            yield

    @contextmanager
    def _exchanged(
        self,
        begun: list[ParamState],
        model: torch.nn.Module | None = None,
        update_bn: Iterable[Any] | None = None,
    ) -> Iterator[None]:
        """Hold the averages that have begun in the params, on all ranks."""
        redundancy = self._settings.redundancy
        try:
            self._settings.is_exchanged = True
            with (
                redundancy.shared_again(),
                averages.exchanged(begun),
                batch_norm.kept_buffers(model),
            ):
                redundancy.share()
                if (
                    model is not None
                    and update_bn is not None
                    # Forwards of wrapped models communicate: on all ranks or on none.
                    and any(redundancy.greatest([len(begun)]))
                ):
                    batch_norm.update_statistics(model, update_bn)
                yield
        finally:
            try:
                self._settings.is_exchanged = False
            finally:
                self._settings.is_exchanged = False  # after an interrupt, too

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
            may have copies of them; or each rank of a ``ZeroRedundancyOptimizer`` has the averages
            of some params, and the target is not the model that is trained. Nothing is changed.

        See Also
        --------
        averaged_state_dict : finds the params in any model, by names.
        """
        params = self._params()
        targets: list[Any]
        self._settings.redundancy.check_target(target)
        forget_copies()
        if isinstance(target, torch.nn.Module):
            targets = _params_in(target, params, self.param_groups)
        else:
            targets = list(target) if hasattr(target, "__iter__") else [None]
            if isinstance(target, Tensor) or not all(isinstance(x, Tensor) for x in targets):
                raise TypeError(
                    "target: expected a torch.nn.Module or an iterable of tensors, got "
                    f"{type(target).__name__}"
                )
        refuse_flattened("copy_averages_to", targets)
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
        averages.copy_to(self._begun("copy_averages_to"), zip(params, targets, strict=True))
        self._settings.redundancy.share()

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
        params = self._settings.redundancy.params(self.param_groups)
        forget_copies()
        if {id(param) for param in params}.isdisjoint(map(id, model.parameters())):
            raise ValueError("model: has none of the optimizer's params")
        refuse_flattened("averaged_state_dict", params)
        begun = self._begun("averaged_state_dict")
        with nullcontext() if self._settings.is_exchanged else self._exchanged(begun):
            # Compiled, the copy would be empty.
            shipped: dict[str, Any] = torch.compiler.disable(averages.shipped)(model)
            return shipped

    @property
    def averages(self) -> list[Tensor]:
        """The averages, one for each param in the order of the groups.

        Each is the tensor that the steps update in place, in the dtype of its param or
        `average_dtype`. Until averaging begins a copy of the param stands for it, which an average
        equals until then, unless ``lazy_average=False`` has made it. Inside `averaged_parameters`
        it is detached from the param, and shares its memory, if that has its dtype.
        """
        records = {record.param: record for record in self._records()}
        return [
            averages.average_of(records[param])
            if param in records
            else copy_as(param, state.dtype_of_average(param, self._settings))
            for param in self._params()
        ]

    @property
    def is_averaging(self) -> bool:
        """Whether the average of any param has begun."""
        return bool(averages.begun(self._records()))

    def start_averaging(self, group: int | None = None) -> None:
        """Make the next step's iterate the first one in the averages.

        Averages that have begun are begun anew. Params that have no gradient in the next step
        begin with their own next step. Sets t0 of the group, the same on all ranks of a
        ``ZeroRedundancyOptimizer``, which must call together. A CUDA graph that was captured before
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
            The averages stand in the params: see `averaged_parameters`; or the params were taken
            out of the groups.
        """
        self._settings.refuse_exchanged("start_averaging")
        if not self._params():
            self._refuse_replaced("start_averaging")
        groups = self.param_groups
        if group is not None:
            groups = [groups[check_place("group", group, len(groups))]]
        records = [self._records(each) for each in groups]
        redundancy = self._settings.redundancy
        most = redundancy.greatest([state.most_steps(each) for each in records])
        for each, own, steps in zip(groups, records, most, strict=True):
            state.start(self.state, each, own, steps)
        redundancy.set_t0(self.param_groups)

    def reset_averages(self, group: int | None = None) -> None:
        """Forget the averages, and begin them anew: `start_averaging` by another name.

        `group` is that of `start_averaging`, and so is what is raised.
        """
        self.start_averaging(group)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _records(self, *groups: Group) -> list[ParamState]:
        """Return the states that there are of the params of some groups, by default of all."""
        checkpoints.take_loaded(self)
        return state.states_of(self.state, groups or self.param_groups, self._settings)

    def _refuse_replaced(self, call: str) -> None:
        if self._settings.had_parameters and not has_parameters(self._params()):
            raise RuntimeError(
                f"{call}: the groups no longer have the params that they were given; DeepSpeed's "
                "ZeRO puts copies there, which the model does not read; use "
                "torch.distributed.fsdp.fully_shard instead, or see docs/distributed.md"
            )

    def _begun(self, call: str) -> list[ParamState]:
        """Return the states whose averages have begun, for a call that asks for averages."""
        begun = averages.begun(self._records())
        if begun:
            return begun
        starts = []  # t0 and the number of steps of each
        for group in self.param_groups:
            records = self._records(group)
            steps = floats([record.scalars()[0] for record in records])
            for record, step in zip(records, steps, strict=True):
                t0 = group["t0"] if record.own_t0 is None else record.own_t0
                starts.append((float(t0), step))
        t0, step = min(starts, key=lambda start: start[0] - start[1], default=(0, 0))
        if step and step < t0 + 1:  # else one begins with the next step
            self._settings.warn_once(
                AveragingNotBegunWarning,
                f"{call}: no average has begun, as t0 is {t0:g} and the number of steps is "
                f"{step:g}; these are the params as they are. start_averaging() begins with the "
                "next step; or choose a smaller t0",
            )
        return begun


def _params_in(model: torch.nn.Module, params: list[Tensor], groups: list[Group]) -> list[Tensor]:
    """Return the parameter of a model that belongs to each of the optimizer's."""
    others: list[Tensor] = list(model.parameters())
    if {id(param) for param in params} <= {id(other) for other in others}:
        return params
    names = [name for group in groups for name in group.get("param_names", ())]
    if len(names) == len(params):
        return averages.params_named(model, names)
    if len(groups) > 1:
        raise ValueError(
            "target: it is not clear which of its parameters belong to which of the "
            f"{len(groups)} groups; give the optimizer named_parameters(), or load "
            "averaged_state_dict() into it"
        )
    return others


def refuse_flattened(call: str, params: list[Tensor]) -> None:
    if are_flattened(params):
        raise RuntimeError(
            f"{call}: the params are parts of a FullyShardedDataParallel module, whose next "
            "forward may read copies of them; use torch.distributed.fsdp.fully_shard instead, "
            "or take the averages from FullyShardedDataParallel.optim_state_dict(model, "
            "optimizer)['state'][name]['ax']"
        )
