from collections.abc import Iterable, Sequence
from typing import Any, final

from torch import Tensor, device, dtype

@final
class DeviceRows:
    loss_scale: dict[int, Tensor] | None
    found_inf: dict[int, Tensor] | None
    def count(self) -> None: ...
    def scale(
        self,
        devices: Iterable[int],
        found_inf: Tensor,
        loss_scale: Tensor | float | None,
    ) -> None: ...

@final
class DeviceScalars:
    steps: float
    def __init__(self, numbers: Sequence[float], device: device, dtype: dtype) -> None: ...
    @property
    def device(self) -> int: ...
    @property
    def is_double(self) -> bool: ...
    def views(self) -> tuple[Tensor, Tensor, Tensor]: ...
    def has(self, tensors: Sequence[Any]) -> bool: ...
