"""Measure steps of asgd_fast beside torch's and beside plain loops of the same traffic.

    OMP_PROC_BIND=true python asv_benchmarks/performance.py [section ...] [--save docs]

Bound threads stay apart; else some virtual machines let two of them share a processor. Sections:
large, halves, averages, backward, hot, arrays, scaling, threads; all by default.

The contenders are timed in turn in one process, every round each of them once, and the medians over
the rounds are printed, as tables in Markdown; ratios are the medians of those of each round.
Optimizers are timed whole: hooks, gradients gathered, params, averages and their scalars updated,
versions counted. `--save` writes the figures as performance.json and a plot as performance.png.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import LAST_CACHE, Times, after_backward, from_memory, in_turn, ratio, typical
from models import resnet50
from plain import FLAGS, PlainLoops

import asgd_fast
from asgd_fast import ASGD, _core, asgd_
from asgd_fast._rows.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

OURS = "asgd_fast"
PLAIN = "plain loop"
AVERAGING = "asgd_fast, averaging"
SGD = "torch.optim.SGD(fused=True)"

# For each phase: the options that bring an optimizer into it, the bytes that it moves for each
# float32 element, and the plain loop of that traffic.
PHASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "averaging": ({"t0": 0}, 20, "averaging"),
    "copy": ({"lazy_average": False}, 16, "copying"),
    "lazy": ({}, 12, "stepping"),
}

# The sizes of many tensors, or of few tiny ones.
MANY = {
    "1,000 tensors of 64": [64] * 1000,
    "161 tensors of ResNet-50": resnet50(),
    "4 tensors of 64": [64] * 4,
}


def params_of(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return params with gradients that stay."""
    torch.manual_seed(0)
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return params


def stepped(optimizer: torch.optim.Optimizer, ax: Tensor | None = None) -> Callable[[], object]:
    """Return the step of an optimizer, past its first ones; the average is kept in `ax`."""
    for _ in range(3):
        optimizer.step()
    if ax is not None:
        for entry in optimizer.state.values():
            entry["ax"].data = ax
    return optimizer.step


def torchs(
    params: list[Tensor], phase: str, ax: Tensor | None = None, **options: Any
) -> Callable[[], object]:
    """Return the step of torch's ASGD, which copies where ours is lazy."""
    if phase == "averaging":
        options["t0"] = 0
    return stepped(torch.optim.ASGD(params, **options), ax)


def compiled(p: Tensor, ax: Tensor, phase: str) -> Callable[[], object]:
    """Return the same update as torch.compile makes it of plain operations: one loop."""
    eta, mu = torch.tensor(0.01), torch.tensor(0.1)
    param, grad = p.detach(), torch.as_tensor(p.grad)

    def averaging() -> None:
        param.copy_(param * 0.9999 - eta * grad)
        ax.copy_(ax + (param - ax) * mu)

    def copying() -> None:
        param.copy_(param * 0.9999 - eta * grad)
        ax.copy_(param)

    call: Callable[[], object] = torch.compile(averaging if phase == "averaging" else copying)
    call()
    return call


def table(title: str, header: list[str], rows: list[list[object]]) -> None:
    """Print a table in Markdown."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---" for _ in header) + " |")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def row_of(times: Times, name: str, n: int, width: int) -> list[object]:
    """Return a row: the name, milliseconds, GB/s, and how many times as long as ours it takes."""
    nanoseconds = typical(times, name)
    return [
        name,
        f"{nanoseconds / 1e6:.3f}",
        f"{n * width / nanoseconds:.1f}",
        f"{ratio(times, name, OURS):.2f}",
    ]


HEADER = ["", "ms", "GB/s, if it moved no more than ours", "times ours"]


def large(plain: PlainLoops) -> dict[str, Any]:
    """One float32 tensor, in each phase."""
    results = {}
    for n in (10**6, 10**7, 10**8):
        for phase, (options, width, floor) in PHASES.items():
            (p,) = params_of(n)
            assert p.grad is not None
            # All on the same memory, as some of it is faster than other.
            ax = torch.zeros(n)
            contenders = {
                OURS: stepped(ASGD([p], **options), None if phase == "lazy" else ax),
                PLAIN: plain.loop(floor, p.detach(), p.grad, ax),
                "torch.optim.ASGD": torchs([p], phase, ax),
                "torch.optim.ASGD(foreach=True)": torchs([p], phase, ax, foreach=True),
                "torch.compile of the update": compiled(p, ax, phase),
            }
            if phase == "lazy":
                contenders[SGD] = stepped(torch.optim.SGD([p], lr=0.01, fused=True))
            # What the caches hold is found there, and then the memory does not matter.
            measure = in_turn if 12 * n <= LAST_CACHE else from_memory
            times = measure(contenders, max(15, min(60, 4 * 10**8 // n)))
            table(
                f"{n:,} float32, {phase}, {width} bytes an element",
                HEADER,
                [row_of(times, name, n, width) for name in times],
            )
            results[f"{n} {phase}"] = times
    return results


def halves(plain: PlainLoops) -> dict[str, Any]:
    """One tensor of 10 million elements of each half type, in each phase."""
    results = {}
    n = 10**7
    for dtype in (torch.bfloat16, torch.float16):
        for phase, (options, width, floor) in PHASES.items():
            (p,) = params_of(n, dtype=dtype)
            assert p.grad is not None
            ax = torch.zeros_like(p).detach()
            contenders = {
                OURS: stepped(ASGD([p], **options), None if phase == "lazy" else ax),
                PLAIN: plain.loop(floor, p.detach(), p.grad, ax),
                "torch.optim.ASGD": torchs([p], phase, ax),
                "torch.optim.ASGD(foreach=True)": torchs([p], phase, ax, foreach=True),
            }
            times = from_memory(contenders, 30)
            table(
                f"{n:,} {dtype}, {phase}, {width // 2} bytes an element",
                HEADER,
                [row_of(times, name, n, width // 2) for name in times],
            )
            results[f"{dtype} {phase}"] = times
    return results


def averages(plain: PlainLoops) -> dict[str, Any]:
    """Wide averages, averages of each tenth iterate, and averages put to use."""
    results = {}
    n = 10**7

    def wide(dtype: torch.dtype, average_dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        (p,) = params_of(n, dtype=dtype)
        assert p.grad is not None
        ax = torch.zeros(n, dtype=average_dtype)
        return {
            OURS: stepped(ASGD([p], t0=0, average_dtype=average_dtype), ax),
            PLAIN: plain.loop("wide", p.detach(), p.grad, ax),
            "torch.optim.ASGD, its ax made wide": torchs([p], "averaging", ax),
        }

    def each_tenth() -> dict[str, Callable[[], object]]:
        (p,) = params_of(n)
        assert p.grad is not None
        ax = torch.zeros(n)
        step = stepped(ASGD([p], t0=0, average_every=10), ax)
        averaging = plain.loop("averaging", p.detach(), p.grad, ax)
        stepping = plain.loop("stepping", p.detach(), p.grad, ax)

        def plain_ten() -> None:
            averaging()
            for _ in range(9):
                stepping()

        return {OURS: partial(repeated, step, 10), PLAIN: plain_ten}

    def swapped() -> dict[str, Callable[[], object]]:
        (p,) = params_of(n)
        optimizer = ASGD([p], t0=0)
        ax = torch.zeros(n)
        stepped(optimizer, ax)
        swap = plain.loop("swapping", p.detach(), ax, ax)

        def in_and_out() -> None:
            with optimizer.averaged_parameters():
                pass

        def by_torch() -> None:
            with torch.no_grad():
                kept = p.clone()
                p.copy_(ax)
                p.copy_(kept)

        return {
            OURS: in_and_out,
            PLAIN: partial(repeated, swap, 2),
            "torch: p kept in a clone": by_torch,
        }

    cases: dict[str, tuple[int, Callable[[], dict[str, Callable[[], object]]]]] = {
        "float32 in float64, averaging": (28, partial(wide, torch.float32, torch.float64)),
        "bfloat16 in float32, averaging": (14, partial(wide, torch.bfloat16, torch.float32)),
        "float32, average_every=10, ten steps": (128, each_tenth),
        "float32, averaged_parameters, in and out": (32, swapped),
    }
    for title, (width, contenders) in cases.items():
        times = from_memory(contenders(), 30)
        table(
            f"{n:,} {title}, {width} bytes an element",
            HEADER,
            [row_of(times, name, n, width) for name in times],
        )
        results[title] = times
    return results


def repeated(call: Callable[[], object], times: int) -> None:
    """Make a call so many times."""
    for _ in range(times):
        call()


def backward(_: PlainLoops) -> dict[str, Any]:
    """Time steps where training loops have them, after a backward pass; one thread."""
    results = {}
    everyone = torch.get_num_threads()
    torch.set_num_threads(1)
    for title, sizes in MANY.items():
        params = params_of(*sizes)
        optimizers: dict[str, torch.optim.Optimizer] = {
            OURS: ASGD(params),
            AVERAGING: ASGD(params, t0=0),
            SGD: torch.optim.SGD(params, lr=1e-3, fused=True),
            "torch.optim.SGD(foreach=True)": torch.optim.SGD(params, lr=1e-3, foreach=True),
            "torch.optim.ASGD": torch.optim.ASGD(params),
        }
        times = after_backward(optimizers, params, 41)
        many(f"{title}, float32, after a backward pass", times, len(sizes), SGD)
        results[title] = times
    torch.set_num_threads(everyone)
    return results


def hot(_: PlainLoops) -> dict[str, Any]:
    """Time steps in a row, whose gradients stay and are in the caches as far as they fit."""
    results = {}
    for title, sizes in MANY.items():
        params = params_of(*sizes)
        contenders = {
            OURS: stepped(ASGD(params)),
            AVERAGING: stepped(ASGD(params, t0=0)),
            "torch.optim.ASGD": torchs(params, "averaging"),
            "torch.optim.ASGD(foreach=True)": torchs(params, "averaging", foreach=True),
            SGD: stepped(torch.optim.SGD(params, lr=1e-3, fused=True)),
            "torch.optim.SGD(foreach=True)": stepped(
                torch.optim.SGD(params, lr=1e-3, foreach=True)
            ),
        }
        times = in_turn(contenders, 21)
        many(f"{title}, float32, hot", times, len(sizes), OURS)
        results[title] = times
    return results


def many(title: str, times: Times, n_tensors: int, other: str) -> None:
    """Print the table of a case of `MANY`, with ratios to one contender."""
    table(
        title,
        ["", "us a step", "ns a tensor", "times ours" if other == OURS else f"times {other}"],
        [
            [
                name,
                f"{typical(times, name) / 1e3:.1f}",
                f"{typical(times, name) / n_tensors:.0f}",
                f"{ratio(times, name, other):.2f}",
            ]
            for name in times
        ],
    )


def arrays(_: PlainLoops) -> dict[str, Any]:
    """Update 1,000 arrays of 64, without torch's optimizer around it."""
    sizes = [64] * 1000
    params = [p.detach() for p in params_of(*sizes)]
    grads, axs = ([torch.randn(64) for _ in sizes] for _ in range(2))
    as_numpy = [[x.numpy() for x in arrays] for arrays in (params, grads, axs)]
    times = in_turn(
        {
            "torch tensors": lambda: asgd_(params, grads, axs, eta=0.01, mu=0.1),
            "torch tensors, no average": lambda: asgd_(params, grads, eta=0.01),
            "NumPy arrays": lambda: asgd_(*as_numpy, eta=0.01, mu=0.1),
            "NumPy arrays, no average": lambda: asgd_(*as_numpy[:2], eta=0.01),
        },
        21,
    )
    table(
        "asgd_ of 1,000 x 64 float32",
        ["", "ns a param"],
        [[name, f"{typical(times, name) / len(sizes):.0f}"] for name in times],
    )
    return {"1,000 x 64": times}


def scaling(plain: PlainLoops) -> dict[str, Any]:
    """Time an element over sizes, with one thread and with all."""
    results = {}
    rows: list[list[object]] = []
    everyone = torch.get_num_threads()
    for n in (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8):
        (p,) = params_of(n)
        assert p.grad is not None
        ax = torch.zeros(n)
        step = stepped(ASGD([p], t0=0), ax)
        loop = plain.loop("averaging", p.detach(), p.grad, ax)

        def alone(call: Callable[[], object]) -> None:
            torch.set_num_threads(1)
            call()
            torch.set_num_threads(everyone)

        times = from_memory(
            {
                OURS: step,
                PLAIN: loop,
                "asgd_fast, 1 thread": partial(alone, step),
                "plain loop, 1 thread": partial(alone, loop),
            },
            max(7, min(40, 4 * 10**8 // n)),
        )
        results[str(n)] = times
        rows.append(
            [
                f"{n:,}",
                *(f"{typical(times, name) / n:.3f}" for name in times),
                f"{ratio(times, 'asgd_fast, 1 thread', OURS):.2f}",
                f"{ratio(times, 'plain loop, 1 thread', PLAIN):.2f}",
            ]
        )
    names = [f"{name}, ns an element" for name in times]
    table(
        "Averaging over sizes",
        ["float32 elements", *names, f"gain of {everyone} threads", "gain of the plain loop"],
        rows,
    )
    return results


def threads(_: PlainLoops) -> dict[str, Any]:
    """When a second thread is worth its start, with the others awake."""
    results = {}
    rows: list[list[object]] = []
    awake = torch.zeros(1 << 17)
    everyone = torch.get_num_threads()
    for kib in (32, 64, 128, 256, 512, 1024, 4096):
        (p,) = params_of(kib * 256)
        rows_of_step = Rows(("param", "grad", "average"))
        assert p.grad is not None
        rows_of_step.extend([p.detach()], [p.grad], [torch.zeros_like(p)], eta=0.01, mu=0.1)

        def step(n: int, rows_of_step: Rows = rows_of_step) -> None:
            awake.add_(1)  # what torch does in a training loop all the time
            _core.update(rows_of_step, n)

        times = in_turn(
            {
                "1": partial(step, 1),
                str(everyone): partial(step, everyone),
                "": lambda: awake.add_(1),
            },
            60,
        )
        results[str(kib)] = times
        overhead = typical(times, "")
        rows.append(
            [
                kib,
                *(
                    f"{(typical(times, name) - overhead) / 1e3:.1f}"
                    for name in ("1", str(everyone))
                ),
            ]
        )
    table("Threads", ["KiB of params", "1 thread, us", f"{everyone} threads, us"], rows)
    return results


SECTIONS = {
    section.__name__: section
    for section in (large, halves, averages, backward, hot, arrays, scaling, threads)
}


def plot(results: dict[str, dict[str, Times]], path: Path) -> None:
    """Draw the times of a large tensor, those over sizes, and those after a backward pass."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["phases", "sizes"], ["backward", "backward"]], figsize=(12, 8.5), layout="constrained"
    )
    left, right = axes["phases"], axes["sizes"]
    names = [
        OURS,
        PLAIN,
        "torch.compile of the update",
        "torch.optim.ASGD",
        "torch.optim.ASGD(foreach=True)",
    ]
    for k, name in enumerate(names):
        heights = [typical(results["large"][f"{10**8} {phase}"], name) / 1e6 for phase in PHASES]
        places = [x + 0.16 * (k - 2) for x in range(len(PHASES))]
        bars = left.bar(places, heights, 0.15, label=name)
        left.bar_label(bars, fmt="%.0f", fontsize=8)
    left.set_xticks(
        range(len(PHASES)), [f"{phase}\n{PHASES[phase][1]} bytes an element" for phase in PHASES]
    )
    left.set_ylabel("ms a step")
    left.set_title("One tensor of 100 million float32")
    left.set_ylim(top=1.4 * left.get_ylim()[1])
    left.legend(fontsize=8, ncols=2, loc="upper center")
    sizes = [int(n) for n in results["scaling"]]
    for name in (OURS, PLAIN, "asgd_fast, 1 thread", "plain loop, 1 thread"):
        style = ":" if name.startswith("plain") else "-"
        per_element = [typical(results["scaling"][str(n)], name) / n for n in sizes]
        right.plot(sizes, per_element, style, marker=".", label=name)
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_xlabel("float32 elements")
    right.set_ylabel("ns an element")
    right.set_title("Averaging")
    right.legend(fontsize=8)
    below, cases = axes["backward"], results["backward"]
    beside = [name for name in next(iter(cases.values())) if name != SGD]
    for k, name in enumerate(beside):
        ratios = [ratio(times, name, SGD) for times in cases.values()]
        places = [x + 0.16 * (k - 1.5) for x in range(len(cases))]
        bars = below.bar(places, [x - 1 for x in ratios], 0.15, bottom=1, label=name)
        below.bar_label(bars, [f"{x:.2f}" for x in ratios], fontsize=8)
    below.set_yscale("log")
    below.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
    below.minorticks_off()
    below.set_ylim(0.2, 32)
    below.axhline(1, color="gray", linewidth=0.8)
    below.set_xticks(range(len(cases)), list(cases))
    below.set_ylabel(f"times {SGD}")
    below.set_title("A step after a backward pass, 1 thread")
    below.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--save", type=Path, help="the folder for performance.json and .png")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; expected any of {', '.join(SECTIONS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    facts = asgd_fast.show_config("dicts")
    machine = {
        "processor": _processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "last cache": f"{LAST_CACHE / 2**20:.0f} MiB",
        "simd": facts["cpu"]["simd"],
        "compiler": facts["build"]["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "plain loops": " ".join(FLAGS),
    }
    for name, value in machine.items():
        print(f"- {name}: {value}")
    plain = PlainLoops()
    results = {name: SECTIONS[name](plain) for name in arguments.sections or SECTIONS}
    if arguments.save:
        arguments.save.mkdir(exist_ok=True)
        medians = {
            section: {
                case: {name: round(typical(times, name)) for name in times}
                for case, times in cases.items()
            }
            for section, cases in results.items()
        }
        _record(arguments.save / "performance.json", machine, medians)
        if {"large", "scaling", "backward"} <= results.keys():
            plot(results, arguments.save / "performance.png")


def _record(path: Path, machine: dict[str, Any], medians: dict[str, Any]) -> None:
    """Put the figures of this machine in the place of its own, and print all machines' shares."""
    machines = json.loads(path.read_text()) if path.exists() else {}
    name = f"{machine['processor']}, {machine['simd']}"
    before = machines.get(name, {})
    if before.get("machine") == machine:  # sections that were not measured again stay
        medians = {**before["median ns a step"], **medians}
    machines[name] = {"machine": machine, "median ns a step": medians}
    path.write_text(json.dumps(machines, indent=1) + "\n")

    shares: dict[str, dict[str, str]] = {}
    for column, figures in machines.items():
        for section in ("large", "halves", "averages"):
            for case, times in figures["median ns a step"].get(section, {}).items():
                share = f"{times[PLAIN] / times[OURS]:.2f}"
                shares.setdefault(case, {})[column] = share
    rows: list[list[object]] = [
        [case, *(share.get(column, "") for column in machines)] for case, share in shares.items()
    ]
    table("Shares of the plain loop's speed, by machine", ["", *machines], rows)


def _processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
