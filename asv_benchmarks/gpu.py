"""Times of steps on a CUDA device, beside torch's: ``python asv_benchmarks/gpu.py [--save docs]``.

First the bits are compared with those of the CPU. Then each case is timed, those that have a target
first: its contenders in turn, steps between two events of the device, after a warm-up; the host's
time is that of a call which does not wait. With --save, gpu.json and gpu_figures.md there have the
figures, with the card and all versions, from the first case on: a run that is cut short leaves what
it has. With --seconds, cases that do not fit are left out and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import shlex
import sys
import warnings
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from gpu_page import CAPTURABLE, COMPILED, COPY, GRAPH, OURS, TORCH, report

from asgd_fast import ASGD, asgd_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# The shapes of a ResNet-50 have 161 tensors of 25.6 million numbers in all.
SIZES = {
    **{f"1e{k}": [10**k] for k in (6, 7, 8, 9)},
    "161 tensors, 25.6 M": [158_745] * 161,
    "300 of 1e4": [10_000] * 300,
    "1,000 of 1e4": [10_000] * 1000,
}

# The dtypes of params and averages. torch has no averages that are wider.
SINGLE, DOUBLE = (torch.float32, torch.float32), (torch.float64, torch.float64)
HALVES = [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)]
WIDE = [
    (torch.float32, torch.float64),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]

# A contender has at least 3 rounds of a case and at most 20, as many as fit into 4 seconds.
ROUNDS, LEAST_ROUNDS, SECONDS = 20, 3, 4.0
CALLS = 5


class Case(NamedTuple):
    """What is timed.

    Attributes
    ----------
    name : str
        Of the sizes of its tensors.
    dtype, average_dtype : torch.dtype
    phase : {"average", "copy", "lazy", "capturable"}
        Of the average, which is made, is copied or does not exist; capturable steps make one.
    """

    name: str
    dtype: torch.dtype
    average_dtype: torch.dtype
    phase: str

    @property
    def label(self) -> str:
        """What it is called."""
        names = [str(x).removeprefix("torch.") for x in (self.dtype, self.average_dtype)]
        return f"{self.name} {' with averages of '.join(dict.fromkeys(names))}, {self.phase}"

    @property
    def n(self) -> int:
        """How many numbers the tensors have."""
        return sum(SIZES[self.name])

    @property
    def moved(self) -> int:
        """The bytes that our step moves: reads param, grad and average, and writes both."""
        passes = {"copy": 1, "lazy": 0}.get(self.phase, 2)
        return self.n * (3 * self.dtype.itemsize + passes * self.average_dtype.itemsize)

    @property
    def needed(self) -> int:
        """The bytes of memory that all contenders take, at most."""
        held = 7 * self.dtype.itemsize + 2 * self.average_dtype.itemsize
        return self.n * held + self.moved

    @property
    def seconds(self) -> float:
        """How long it may take; torch's compiler most of it."""
        compiling = (40 if len(SIZES[self.name]) == 1 else 90) if self.phase == "capturable" else 0
        return SECONDS + self.n / 1e8 + compiling


def cases() -> Iterator[Case]:
    """Yield what is timed, those first that have a target."""
    for names, pairs, phases in (
        (("1e8",), [SINGLE], ("average", "lazy", "copy", "capturable")),
        (("300 of 1e4",), [SINGLE], ("average", "lazy")),
        (("1e8",), HALVES, ("average", "lazy")),
        (("1e8",), WIDE, ("average",)),
        (("300 of 1e4",), [SINGLE], ("capturable",)),  # nobody knows how long it compiles
        (("1,000 of 1e4", "1e9", "161 tensors, 25.6 M"), [SINGLE], ("average", "lazy")),
        (("1e7", "1e6"), [SINGLE], ("average", "lazy", "copy")),
        (("1e8",), [DOUBLE], ("average", "lazy", "copy")),
        (("1e9",), HALVES, ("average", "lazy")),
    ):
        for name in names:
            for pair in pairs:
                for phase in phases:
                    yield Case(name, *pair, phase)


def wrong_bits(n: int = 10**6) -> list[str]:
    """Return where steps on the device differ from those on the CPU, aligned arrays and others."""
    torch.manual_seed(0)
    found = []
    for dtypes in (SINGLE, DOUBLE, *HALVES, *WIDE):
        for offsets in ((0, 0, 0), (1, 1, 1), (1, 2, 3)):
            try:
                wrong = _wrong_arrays(n, dtypes, offsets)
            except Exception as error:  # the others are compared
                wrong = [f"{type(error).__name__}: {error}"]
            found += [f"{x} of {dtypes[0]}, {dtypes[1]}, offsets {offsets}" for x in wrong]
    return found


def _wrong_arrays(
    n: int, dtypes: tuple[torch.dtype, torch.dtype], offsets: tuple[int, int, int]
) -> list[str]:
    """Return which arrays differ after two steps, of so many numbers from these places on."""
    dtype, average_dtype = dtypes
    memory = [torch.randn(n + 3).to(x) for x in (dtype, dtype, average_dtype)]
    there = [x.cuda()[k : k + n] for x, k in zip(memory, offsets, strict=True)]
    here = [x[k : k + n] for x, k in zip(memory, offsets, strict=True)]
    for mu in (1.0, 0.3):
        for arrays in (here, there):
            asgd_(*arrays, eta=0.1, mu=mu, weight_decay=0.1)
    return [
        name
        for name, x, y in zip(("param", "grad", "average"), here, there, strict=True)
        if not torch.equal(x.view(torch.uint8), y.cpu().view(torch.uint8))
    ]


def contenders(case: Case) -> dict[str, Callable[[], object]]:
    """Return the steps of a case, over the same params and gradients."""
    params = [torch.randn(n, device="cuda").to(case.dtype) for n in SIZES[case.name]]
    for param in params:
        param.grad = torch.randn_like(param)
    options: dict[str, Any] = {"lr": 1e-4, "t0": 1e6 if case.phase in ("copy", "lazy") else -1.0}
    is_wide = case.average_dtype != case.dtype
    ours = ASGD(
        params,
        lazy_average=case.phase == "lazy",
        average_dtype=case.average_dtype if is_wide else None,
        **options,
    )
    found: dict[str, Callable[[], object]] = {OURS: ours.step}
    # Reads and writes half of what the step moves, each.
    n = case.moved // 2
    source, target = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    found[COPY] = partial(target.copy_, source.random_())
    if case.phase == "capturable":
        captured = ASGD(params, capturable=True, **options)
        found[CAPTURABLE] = captured.step
        found[GRAPH] = _replay(captured)
        compiled = torch.optim.ASGD(params, capturable=True, **options)
        found[COMPILED] = torch.compile(compiled.step, fullgraph=False)
    elif not is_wide:
        found[TORCH] = torch.optim.ASGD(params, **options).step
        found["torch.optim.SGD(fused)"] = torch.optim.SGD(params, lr=1e-4, fused=True).step
    return found


def _replay(optimizer: ASGD) -> Callable[[], object]:
    """Return a step that is captured at its first call."""

    @cache
    def graph() -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        found = torch.cuda.CUDAGraph()
        with torch.cuda.graph(found):
            optimizer.step()
        return found

    return lambda: graph().replay()


def measured(case: Case) -> dict[str, dict[str, float]]:
    """Time the contenders of a case in turn: medians, ms of the device and us of the host."""
    torch.compiler.reset()  # after 8 cases it would compile no more
    gc.collect()
    torch.cuda.empty_cache()
    if case.needed > torch.cuda.mem_get_info()[0]:
        raise MemoryError("more than the device has free")
    steps = {name: step for name, step in contenders(case).items() if _works(step, name)}
    device: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    gc.collect()
    gc.disable()
    until = perf_counter() + SECONDS
    try:
        for i in range(ROUNDS):
            if i >= LEAST_ROUNDS and perf_counter() > until:
                break
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
    return {name: {"device": median(device[name]), "host": median(host[name])} for name in steps}


def _works(step: Callable[[], object], name: str) -> bool:
    """Return whether a step can be made; if not, the others are timed."""
    try:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    except Exception as error:
        _tell(f"{name}: {type(error).__name__}: {error}")
        return False
    return True


def measure(
    selected: Iterable[Case],
    results: dict[str, Any],
    seconds: float = math.inf,
    time: Callable[[Case], dict[str, dict[str, float]]] = measured,
    folder: Path | None = None,
) -> None:
    """Time the cases that fit into the seconds, and save the results after each of them."""
    end = perf_counter() + seconds
    for case in selected:
        reason = ""
        if perf_counter() + case.seconds > end:
            reason = "no time"
        else:
            try:
                times = time(case)
                results["cases"][case.label] = {"moved": case.moved, "times": times}
            except Exception as error:  # the others are timed
                reason = f"{type(error).__name__}: {error}"
        if reason:
            results["left out"][case.label] = reason
        _tell(f"{case.label}: {reason or 'timed'}")
        if folder is not None:
            save(results, folder)


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


def _driver_version() -> int:
    from cuda.bindings import driver

    _, number = driver.cuDriverGetVersion()
    return int(number)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Check, measure, and print or save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="a folder for gpu.json and gpu_figures.md")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out what takes more")
    parser.add_argument(
        "cases", nargs="?", default="", help="a regular expression: 'float32, lazy'"
    )
    arguments = parser.parse_args()
    end = perf_counter() + arguments.seconds
    if not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 1
    # That capturable steps are made outside of graphs.
    warnings.filterwarnings("ignore", message=".*capturable.*")
    results: dict[str, Any] = {"machine": machine(), "cases": {}, "left out": {}}
    wrong = wrong_bits()
    results["machine"]["bits"] = "; ".join(wrong) + " WRONG" if wrong else "as on the CPU"
    _tell(f"bits: {results['machine']['bits']}")
    selected = [case for case in cases() if re.search(arguments.cases, case.label)]
    measure(selected, results, end - perf_counter(), folder=arguments.save)
    if arguments.save is not None:
        save(results, arguments.save)
    print(report(results))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
