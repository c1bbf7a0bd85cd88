"""Compile the kernels that tests/test_gpu.py and asv_benchmarks/gpu.py launch, on all processors.

They go to the user's cache: each takes seconds, which tests and measurements need not wait for.
"""

import subprocess
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from time import perf_counter

from asgd_fast.cuda.build import Kind, stored

HALVES, WIDE = ("float16", "bfloat16"), ("float32", "float64")
MIXED = [*product(HALVES, WIDE), WIDE]
SAME = [(dtype, dtype) for dtype in HALVES + WIDE]
KINDS = [
    *(
        Kind("update", *pair, on_device, 512)
        for pair in SAME + MIXED
        for on_device in (False, True)
    ),
    *(
        Kind("update", "float32", "float32", on_device, n_words)
        for on_device in (False, True)
        for n_words in (1536, 4095)
    ),
    *(Kind("exchange", bits, bits, False, 512) for bits in ("bits16", "bits32", "bits64")),
    *(Kind("assign", *pair, False, 512) for pair in MIXED),
]


def compiled(kind: Kind, compute_capability: tuple[int, int]) -> str:
    """Compile a kernel, and return a line about it."""
    start = perf_counter()
    size = len(stored(kind, compute_capability).cubin)
    return f"{', '.join(map(str, kind))}: {size} bytes, {perf_counter() - start:.1f} s"


def main() -> None:
    """Compile for the first GPU, or without one for compute capability 9.0."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        answer = "9.0"
    major, minor = answer.split()[0].split(".")
    with ProcessPoolExecutor() as pool:
        for line in pool.map(compiled, KINDS, repeat((int(major), int(minor)))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
