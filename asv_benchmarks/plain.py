"""The plain loops of plain.c, compiled for this machine; run by torch's threads or by one."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FLAGS", "PlainLoops"]

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")


class PlainLoops:
    """The loops, by name: averaging, copying, stepping, wide, swapping.

    Parameters
    ----------
    parallel : bool
        By as many threads as torch's operations; else by the caller's alone, which needs no
        OpenMP runtime.
    """

    def __init__(self, *, parallel: bool = True) -> None:
        compiler = (sysconfig.get_config_var("CC") or "cc").split()
        source = Path(__file__).with_name("plain.c")
        flags = [flag for flag in FLAGS if parallel or flag != "-fopenmp"]
        if parallel:
            # Which commits of before there were threads do not have.
            from asgd_fast.threads import openmp_runtime

            # In the process already, so that the loops find its functions and bring no other.
            ctypes.CDLL(openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
        with tempfile.TemporaryDirectory() as folder:
            compiled, library = f"{folder}/plain.o", f"{folder}/plain.so"
            subprocess.run([*compiler, *flags, "-c", source, "-o", compiled], check=True)
            subprocess.run([*compiler, "-shared", compiled, "-o", library], check=True)
            self._library = ctypes.CDLL(library)

    def loop(self, name: str, p: Tensor, g: Tensor, a: Tensor) -> Callable[[], None]:
        """Return a call of a loop over three tensors.

        Half types go as float32 tensors of the same bytes: half as many elements.

        Parameters
        ----------
        name : str
        p, g, a : Tensor
            Contiguous, of one dtype and size, but that the loop "wide" takes an average of float64
            for float32, and of float32 for bfloat16.
        """
        if p.itemsize == 2 and name != "wide":
            p, g, a = (x.view(torch.float32) for x in (p, g, a))
        real = {2: "bfloat16", 4: "float", 8: "double"}[p.itemsize]
        function = getattr(self._library, f"{name}_{real}")
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64]
        function.restype = None
        tensors = p, g, a  # kept alive by the call

        def call() -> None:
            function(*(x.data_ptr() for x in tensors), tensors[0].numel())

        return call
