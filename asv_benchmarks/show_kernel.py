"""Print the code of a CUDA kernel: its PTX, or the instructions that a GPU gets (SASS).

    python asv_benchmarks/show_kernel.py [ptx|sass|report] [--job update] [--param float32]
        [--average float32] [--cc 9.0]

No GPU is needed, but the packages of the extra "cuda"; for SASS also nvdisasm, of CUDA's toolkit or
of the package nvidia-cuda-nvdisasm. The report is the linker's: registers, stack and spills.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from asgd_fast.cuda.build import Kind, link, ptx_of


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=("ptx", "sass", "report"), default="sass")
    parser.add_argument("--job", default="update", help="update, exchange or assign")
    parser.add_argument("--param", default="float32", help="its dtype")
    parser.add_argument("--average", help="its dtype (default: that of the param)")
    parser.add_argument("--cc", default="9.0", help="the GPU's compute capability")
    parser.add_argument("--device-scalars", action="store_true", help="with scalars in GPU memory")
    parser.add_argument("--words", type=int, default=512, help="the room of a launch")
    arguments = parser.parse_args()

    major, minor = map(int, arguments.cc.split("."))
    average = arguments.average or arguments.param
    kind = Kind(arguments.job, arguments.param, average, arguments.device_scalars, arguments.words)
    ptx = ptx_of(kind, (major, minor))
    if arguments.what == "ptx":
        print(ptx)
        return
    cubin, report = link(ptx, (major, minor))
    print(report if arguments.what == "report" else disassembled(cubin))


def disassembled(cubin: bytes) -> str:
    """Return the instructions of a binary, as nvdisasm prints them.

    Parameters
    ----------
    cubin : bytes

    Returns
    -------
    str
    """
    # Beside a toolkit's, that of the Python package.
    packaged = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/nvdisasm")
    tool = shutil.which("nvdisasm") or next(map(str, packaged), None)
    if tool is None:
        raise SystemExit("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--print-code", file.name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout


if __name__ == "__main__":
    main()
