"""Times of steps on a CUDA device, beside torch's: ``python asv_benchmarks/gpu.py [--save docs]``.

First the tests that need a GPU are run, unless told otherwise; if they fail, the page and the exit
status say so. Then each case is timed: its contenders in turn, steps between two events of the
device, after a warm-up; the host's time is that of a call which does not wait. With --save,
gpu.json and gpu_figures.md there have the figures, with the card and all versions, from the first
case on: a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from asgd_fast import ASGD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPOSITORY = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (10**6, 10**7, 10**8, 10**9)

# How often the memory of a number is passed over: read param, grad and average; write both.
PASSES = {"average": 5, "copy": 4, "lazy": 3}

# The shapes of a ResNet-50 have 161 tensors of 25.6 million numbers in all.
SETS = {
    "161 tensors, 25.6 M": [158_745] * 161,
    "300 of 1e4": [10_000] * 300,
    "1,000 of 1e4": [10_000] * 1000,
}

ROUNDS = 20
CALLS = 5

# What the contenders of a case hold, for each number: params, gradients, both averages, and what
# torch allocates meanwhile; those of float32 two averages more; and the copy what the step moves.
HELD, HELD_MORE = 7, 2


class Case(NamedTuple):
    """What is timed.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    phase : {"average", "copy", "lazy"}
    sizes : list of int
        Of the tensors.
    """

    name: str
    dtype: torch.dtype
    phase: str
    sizes: list[int]

    @property
    def moved(self) -> int:
        """The bytes that our step moves."""
        return PASSES[self.phase] * self.dtype.itemsize * sum(self.sizes)

    @property
    def is_for_graphs(self) -> bool:
        """Whether it is timed in graphs too, whose averages are never lazy."""
        return self.dtype == torch.float32 and self.phase != "lazy"

    @property
    def needed(self) -> int:
        """The bytes of memory that it takes."""
        held = HELD + HELD_MORE * self.is_for_graphs
        return held * self.dtype.itemsize * sum(self.sizes) + self.moved


class Times(NamedTuple):
    """The times of a contender, medians of the rounds: ms for the device, us for the host."""

    device: float
    host: float


def cases() -> Iterator[Case]:
    """Yield what is timed: large tensors in each dtype and phase, and sets of small ones."""
    for dtype in DTYPES:
        for n in SIZES:
            for phase in PASSES:
                yield Case(f"{n:.0e} {_name(dtype)}", dtype, phase, [n])
        for name, sizes in SETS.items():
            for phase in PASSES:
                yield Case(f"{name} {_name(dtype)}", dtype, phase, sizes)


def contenders(case: Case) -> dict[str, Callable[[], object]]:
    """Return the steps of a case, over the same params and gradients."""
    params = [torch.randn(n, device="cuda").to(case.dtype) for n in case.sizes]
    for param in params:
        param.grad = torch.randn_like(param)
    t0 = -1.0 if case.phase == "average" else 1e6
    options: dict[str, Any] = {"lr": 1e-4, "t0": t0}
    ours = ASGD(params, lazy_average=case.phase == "lazy", **options)
    theirs = torch.optim.ASGD(params, **options)
    found: dict[str, Callable[[], object]] = {
        "asgd_fast": ours.step,
        "torch.optim.ASGD": theirs.step,
    }
    if case.is_for_graphs:
        captured = ASGD(params, capturable=True, **options)
        found["asgd_fast, capturable"] = captured.step
        compiled = torch.optim.ASGD(params, capturable=True, **options)
        found["torch.optim.ASGD, compiled"] = torch.compile(compiled.step, fullgraph=False)
        found["asgd_fast in a graph"] = _replay(captured)
    found["torch.optim.SGD(fused)"] = torch.optim.SGD(params, lr=1e-4, fused=True).step
    # Reads and writes half of what the step moves, each.
    n = case.moved // 2
    source, target = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    found["copy of as many bytes"] = partial(target.copy_, source)
    return found


def _replay(optimizer: ASGD) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def measured(case: Case) -> dict[str, Times]:
    """Time the contenders of a case in turn."""
    steps = contenders(case)
    for step in steps.values():
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    device: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for name, step in steps.items():
                step()
                torch.cuda.synchronize()
                begin.record()
                for _ in range(CALLS):
                    step()
                end.record()
                torch.cuda.synchronize()
                device[name].append(begin.elapsed_time(end) / CALLS)
                start = perf_counter()
                step()
                host[name].append((perf_counter() - start) * 1e6)
                torch.cuda.synchronize()
    finally:
        gc.enable()
    return {name: Times(median(device[name]), median(host[name])) for name in steps}


def report(results: dict[str, Any]) -> str:
    """Return the figures as the tables of a page."""
    lines = [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += [
        "",
        "| case | | device, ms | TB/s | of a copy's | times ours | host, us |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in results["cases"]:
        ours, copy = (
            case["times"][name]["device"] for name in ("asgd_fast", "copy of as many bytes")
        )
        label = f"{case['name']}, {case['phase']}"
        for name, times in case["times"].items():
            ms = times["device"]
            figures = (
                f"{ms:.4f} | {case['moved'] / ms / 1e9:.2f} | {copy / ms:.2f} | {ms / ours:.2f}"
            )
            lines.append(f"| {label} | {name} | {figures} | {times['host']:.1f} |")
            label = ""
    return "\n".join(lines) + "\n"


def save(results: dict[str, Any], folder: Path) -> None:
    """Write the figures that there are to gpu.json and gpu_figures.md."""
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "gpu_figures.md").write_text(report(results))


def machine() -> dict[str, str]:
    """Return what the figures are of."""
    properties = torch.cuda.get_device_properties(0)
    packages = ("asgd_fast", "torch", "numba", "numba-cuda", "cuda-bindings")
    return {
        "card": f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory >> 30} GiB",
        "driver": str(_driver_version()),
        "CUDA of torch": str(torch.version.cuda),
        **{package: version(package) for package in packages},
        "command": " ".join(["python asv_benchmarks/gpu.py", *map(shlex.quote, sys.argv[1:])]),
    }


def first_steps() -> str:
    """Return how long new processes take to import asgd_fast and make a step, torch apart.

    The first one has to compile the kernel, and the second one finds it on disk.
    """
    code = """
import time, torch
param = torch.nn.Parameter(torch.zeros(1000, device="cuda"))
param.grad = torch.ones_like(param)
torch.cuda.synchronize()
start = time.perf_counter()
from asgd_fast import ASGD
ASGD([param]).step()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        command = [sys.executable, "-c", code]
        times = [
            subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            for _ in range(2)
        ]
    return " and again ".join(f"{float(time) * 1e3:.0f}" for time in times)


def _driver_version() -> int:
    from cuda.bindings import driver

    _, number = driver.cuDriverGetVersion()
    return int(number)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    """Check, measure, and print or save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="a folder for gpu.json and gpu_figures.md")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument(
        "cases", nargs="?", default="", help="a regular expression: 'float32, lazy'"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 1
    status = 0
    if not arguments.no_tests:
        import pytest

        status = int(pytest.main(["-q", "-m", "gpu", str(REPOSITORY / "tests" / "test_gpu.py")]))
    warnings.filterwarnings(
        "ignore", message=".*capturable.*"
    )  # that steps are made outside of graphs
    results: dict[str, Any] = {"machine": machine(), "cases": []}
    results["machine"]["first step, ms"] = first_steps()
    if not arguments.no_tests:
        results["machine"]["tests"] = "passed" if status == 0 else f"FAILED (pytest: {status})"
    for case in cases():
        label = f"{case.name}, {case.phase}"
        if not re.search(arguments.cases, label):
            continue
        torch.compiler.reset()  # after 8 cases it would compile no more
        gc.collect()
        torch.cuda.empty_cache()
        if case.needed > torch.cuda.mem_get_info()[0]:
            print(f"{label}: more than the memory", file=sys.stderr)
            continue
        try:
            times = {name: each._asdict() for name, each in measured(case).items()}
        except torch.cuda.OutOfMemoryError as error:
            print(f"{label}: {error}", file=sys.stderr)
        else:
            results["cases"].append(
                {"name": case.name, "phase": case.phase, "moved": case.moved, "times": times}
            )
            print(label, file=sys.stderr)
        if arguments.save is not None:
            save(results, arguments.save)
    print(report(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
