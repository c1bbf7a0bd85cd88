from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from typing_extensions import Self

from asgd_fast._rows.rows import Rows

@final
class Slot:
    param: torch.Tensor
    state: dict[str, Any]
    packed: bool
    is_lazy: bool
    on_device: bool
    is_on_gpu: bool
    at_most: float
    average: torch.Tensor | None
    def __new__(
        cls,
        param: torch.Tensor,
        state: dict[str, Any],
        block: torch.Tensor | None = None,
        place: int = 0,
        lazy_at: int = 0,
        on_device: bool = False,
        steps: float = 0,
    ) -> Self: ...
    def is_whole(self) -> bool: ...
    def read_start(self) -> None: ...

@final
class Slots:
    groups: list[list[Slot | None]]
    written: list[torch.Tensor]
    all_on_device: bool
    def __new__(
        cls,
        state: Mapping[torch.Tensor, dict[str, Any]],
        groups: list[list[Slot | None]],
        tensor: type,
        parameter: type,
        eta_after: Callable[[torch.Tensor, float, float, float], float],
        version_of: Callable[[torch.Tensor], torch.Tensor],
        refer: Callable[[torch.Tensor], object],
        alias: Callable[[torch.Tensor], torch.Tensor],
    ) -> Self: ...
    def mark_detached(self) -> None: ...
    def is_current(self, state: object) -> bool: ...
    def gather(
        self,
        table: Rows,
        groups: Sequence[dict[str, Any]],
        unscale: float,
        round_scalars: bool,
        on_device: bool = False,
    ) -> list[tuple[dict[str, Any], Slot]] | None: ...
    def add(
        self,
        table: Rows,
        group: dict[str, Any],
        slot: Slot,
        grad: torch.Tensor,
        unscale: float,
        round_scalars: bool,
    ) -> bool: ...

def same_kind(ax: torch.Tensor, param: torch.Tensor) -> bool: ...
def check_group(group: dict[str, Any]) -> None: ...
def number(name: str, value: object) -> float: ...
