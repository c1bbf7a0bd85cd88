"""The time that importing takes, in interpreters of their own."""

from __future__ import annotations

from importlib.util import find_spec

from .cases import skip_old, titled


class Import:
    """Without torch, and the torch optimizer; when NumPy, or torch, is there already.

    The import without torch went from 21 to 2 ms with c4a2dcb3, which no longer reads the
    installation's metadata, and to 6 ms with 07c156f5: since then it imports ctypes, by which the
    OpenMP runtime is found, and pathlib. That is the price of threads, and known.
    """

    version = "2"

    @titled("import asgd_fast, after import numpy")
    def timeraw_arrays(self) -> tuple[str, str]:
        return "import asgd_fast", "import numpy"

    @titled("from asgd_fast import ASGD, after import torch")
    def timeraw_torch_optimizer(self) -> tuple[str, str]:
        if find_spec("asgd_fast.optim") is None:
            skip_old("this commit has no torch optimizer")
        return "from asgd_fast import ASGD", "import torch"
