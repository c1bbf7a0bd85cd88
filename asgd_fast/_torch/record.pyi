from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, disjoint_base

from asgd_fast.cuda.scalars import DeviceScalars

SCALARS: tuple[str, str, str]

def scalar_tensor(value: float, dtype: torch.dtype) -> Tensor: ...

@disjoint_base
class Record(dict[str, Any]):
    ax: Tensor | None
    start: float | None
    source: Any
    has_average: bool
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def seal(
        self,
        param: Tensor,
        scalars: Sequence[float],
        *,
        is_double: bool,
        is_lazy: bool,
        average_dtype: torch.dtype,
        t0: float | None = None,
    ) -> Self: ...
    def bind(self, param: Tensor, *, is_lazy: bool, average_dtype: torch.dtype) -> Self: ...
    def open(self) -> None: ...
    def contents(self) -> dict[str, Any]: ...
    def scalars(self) -> tuple[Any, Any, Any]: ...
    def missing(self) -> list[str]: ...
    def begin_anew(self, step: float) -> None: ...
    def move(
        self,
        device_scalars: DeviceScalars | None,
        numbers: Sequence[float] | None = None,
    ) -> None: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def param(self) -> Any: ...
    @property
    def average_dtype(self) -> Any: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def is_lazy(self) -> bool: ...
