from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import Self

from asgd_fast._rows.rows import Rows
from asgd_fast._torch.fallback import Left
from asgd_fast._torch.groups import Group
from asgd_fast._torch.state import State

@final
class Work:
    def __new__(cls, state: Any) -> Self: ...
    @property
    def rows(self) -> Rows: ...
    @property
    def left(self) -> list[Left]: ...
    @property
    def written(self) -> list[Tensor]: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def has_all_scalars_on_device(self) -> bool: ...

def gather(
    state: State,
    groups: Iterable[Group],
    *,
    unscale: float,
    scalars_on_device: bool,
    by_torch: bool,
    lazy: bool,
    average_dtype: torch.dtype | None,
) -> Work: ...
