"""The averages of a torch optimizer put to use: in the place of their params, or copied elsewhere.

This module knows params and their state; it does not know how a step is made.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asgd_fast import _engines
from asgd_fast._torch.conversions import extent, ordinary_tensors
from asgd_fast._torch.distributed import check_layout, laid_out_as
from asgd_fast._torch.exchange import Pair, rows_of, written_of
from asgd_fast._torch.internals import forget_copies, increment_versions
from asgd_fast._torch.scalars import floats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from asgd_fast._rows.rows import Rows
    from asgd_fast._torch.state import ParamState

# What wrappers put into the names of the params of the models in them: the last one of these may
# be the name of a user's module, too.
_WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_PREFIXES = [re.compile(rf"(?<![^.])({names})\.") for names in (_WRAPPERS, _WRAPPERS + "|module")]


@contextmanager
def exchanged(records: Sequence[ParamState]) -> Iterator[None]:
    """Hold the averages in the params for as long as the context lasts.

    The records are those of params whose averages have begun. An average in its param's dtype
    trades places with it, and the state then answers with what the param's memory holds; a wider
    one stays where it is, rounded into the param, which is kept in spare memory.

    Raises
    ------
    ValueError
        An average has another shape than its param. Nothing is changed.
    RuntimeError
        The memory of a param or an average was taken away before, and nothing is changed; or it
        was inside, and all others are back in their places.
    """
    pairs, rows = _pairs(records)
    lost: list[Pair] = []
    by_engine = [pair for pair in pairs if not pair.by_torch]
    written = written_of(by_engine)
    try:
        forget_copies()
        increment_versions(written)
        with _engines.exchanged(rows, lambda: _rows_again(by_engine, lost)):
            with ordinary_tensors():
                for pair in pairs:
                    pair.put_average()
            yield
    finally:
        try:
            increment_versions(written)
            _put_back(pairs, lost)
        finally:
            _put_back(pairs, lost)  # what an interrupt has left
            forget_copies()
        if lost:
            shapes = ", ".join(str(tuple(pair.memory.shape)) for pair in reversed(lost))
            raise RuntimeError(
                "averaged_parameters: the memory of params, or of their averages, of the shapes "
                f"{shapes} was taken away inside, so that they cannot be given their iterates "
                "back; all others have theirs"
            )


@torch.no_grad()
def copy_to(records: Sequence[ParamState], targets: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy averages, or params whose averaging has not begun, each to where its target is.

    Each target is a param of the optimizer with a tensor. All ranks of DTensors must call.

    Raises
    ------
    TypeError
        As `check_layout`. Nothing is changed.
    """
    averages = {x.param: x.source if x.ax is None else x.ax for x in records}
    pairs = [(averages.get(param, param), target) for param, target in targets]
    for i, (average, target) in enumerate(pairs):
        check_layout(f"target: tensor {i}", average, target)
    for average, target in pairs:
        target.copy_(laid_out_as(average, target))


def begun(records: Sequence[ParamState]) -> list[ParamState]:
    """Return the states of params whose averages have begun."""
    mus = floats([record.mu for record in records])
    return [record for record, mu in zip(records, mus, strict=True) if mu != 1]


def average_of(record: ParamState) -> Tensor:
    """Return the average of a param, wherever it stands, or before it begins a copy of the param.

    Somebody may keep it, so the state must know that it was shown.
    """
    source: Tensor = record.source
    if source is not record.param:  # it stands in the param
        return source
    ax: Tensor | None = record.contents().get("ax")
    return record.param_as_average() if ax is None else ax


def params_named(model: torch.nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Return the parameters of a model by their names, with or without those of wrappers.

    Raises
    ------
    ValueError
        The model has no parameters of some of the names.
    """
    by_name: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in by_name]
    if not missing:
        return [by_name[name] for name in names]
    for prefixes in _PREFIXES:
        plain = {prefixes.sub("", name): param for name, param in by_name.items()}
        wanted = [prefixes.sub("", name) for name in names]
        are_one_to_one = len(plain) == len(by_name) and len(set(wanted)) == len(set(names))
        if are_one_to_one and plain.keys() >= set(wanted):
            return [plain[name] for name in wanted]
    raise ValueError(f"target: has no parameters named {missing}")


def shipped(model: torch.nn.Module) -> dict[str, Any]:
    """Return a copy of the state dict of a model, by the names that it has without wrappers."""
    state_dict: dict[str, Any] = deepcopy(model.state_dict())
    prefixes = []  # each of a wrapper and of the model in it
    for path, module in model.named_modules(remove_duplicate=False):
        own = path + "." if path else ""
        if "_orig_mod" in module._modules:  # of torch.compile
            prefixes.append((own + "_orig_mod.", own))
        elif isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            prefixes.append((own + "module.", own))
    if not prefixes:
        return state_dict

    def plain(name: str) -> str:
        for long, short in reversed(prefixes):  # the inner ones first
            if name.startswith(long):
                name = short + name[len(long) :]
        return name

    renamed = type(state_dict)((plain(name), value) for name, value in state_dict.items())
    if hasattr(state_dict, "_metadata"):  # of each module
        renamed._metadata = {  # type: ignore[attr-defined]
            plain(path + ".")[:-1]: version for path, version in state_dict._metadata.items()
        }
    return renamed


def _pairs(records: Sequence[ParamState]) -> tuple[list[Pair], Rows]:
    """Return what is to be exchanged, with the rows of what an engine exchanges."""
    with ordinary_tensors():
        pairs = [Pair(record) for record in records if record.ax is not None]
        rows, refused = rows_of(pairs)
        for_torch = [pairs[i] for i in refused]
        if not rows.is_disjoint() or rows.touches([extent(pair.memory) for pair in for_torch]):
            rows.clear()
            for_torch = pairs
        for pair in for_torch:
            pair.leave_to_torch()
    return pairs, rows


def _rows_again(pairs: list[Pair], lost: list[Pair]) -> Rows:
    """Return the rows of what an engine can exchange once more; list what it cannot."""
    for pair in pairs:
        pair.look()
    rows, refused = rows_of(pairs)
    lost[:] = [pairs[i] for i in refused]
    return rows


def _put_back(pairs: list[Pair], lost: list[Pair]) -> None:
    """Put all params back, the last one first, and forget what is done; list what cannot be."""
    with ordinary_tensors():
        for pair in pairs:
            pair.keep()
        while pairs:
            if not pairs[-1].put_back() and pairs[-1] not in lost:
                lost.append(pairs[-1])
            pairs.pop()
