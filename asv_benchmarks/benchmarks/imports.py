"""The time that importing takes, in interpreters of their own."""

from __future__ import annotations

from .cases import titled


class Import:
    """Without torch, and the torch optimizer when torch is there already."""

    version = "1"

    @titled("import asgd_fast")
    def timeraw_arrays(self) -> str:
        return "import asgd_fast"

    @titled("from asgd_fast import ASGD, after import torch")
    def timeraw_torch_optimizer(self) -> tuple[str, str]:
        return "from asgd_fast import ASGD", "import torch"
