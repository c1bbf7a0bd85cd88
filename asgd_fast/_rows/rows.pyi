from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from asgd_fast.cuda.scalars import DeviceRows
from asgd_fast.schedule import AveragingKind

def is_array(candidate: object) -> bool: ...
def dtype_of(array: Any) -> str: ...
def whereabouts_of(
    array: Any,
) -> tuple[int, int | None, int, tuple[int, ...], tuple[int, ...]]: ...

@final
class Rows:
    device_rows: DeviceRows | None
    def __new__(cls, names: tuple[str, str, str]) -> Self: ...
    def extend(
        self,
        params: list[Any],
        grads: list[Any] | None = None,
        axs: list[Any] | None = None,
        *,
        eta: float = 0.0,
        mu: float = 1.0,
        scalars: npt.NDArray[np.float64] | None = None,
        lr: float = 0.0,
        lambd: float = 0.0,
        alpha: float = 0.0,
        t0: float = 0.0,
        starts: npt.NDArray[np.float64] | None = None,
        average_every: float = 1.0,
        averaging: AveragingKind = "mean",
        current: bool = False,
        weight_decay: float = 0.0,
        grad_scale: float = 1.0,
        first: int = 0,
        new_average: Callable[[int], Any] | None = None,
        copy_grads: bool = False,
    ) -> None: ...
    def check_overlap(self) -> None: ...
    def is_disjoint(self) -> bool: ...
    def touches(self, others: list[tuple[int, int]]) -> bool: ...
    def clear(self) -> None: ...
    @property
    def names(self) -> tuple[str, str, str]: ...
    @property
    def cpu_bytes(self) -> int: ...
    @property
    def has_gpu_rows(self) -> bool: ...
    @property
    def streams(self) -> dict[int, int]: ...
    @property
    def others(self) -> dict[int, set[int]]: ...
    def __len__(self) -> int: ...
