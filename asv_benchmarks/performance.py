"""Measure steps of asgd_fast beside torch's and beside plain loops of the same traffic.

    OMP_PROC_BIND=true python asv_benchmarks/performance.py [section ...] [--save docs]

Bound threads stay apart; else some virtual machines let two of them share a processor. Sections:
large, dtypes, averages, backward, hot, arrays, classifier, scaling, threads; all by default.

The contenders are timed in turn in one process, every round each of them once, and the medians over
the rounds are printed, as tables in Markdown; ratios are the medians of those of each round.
Optimizers are timed whole: hooks, gradients gathered, params, averages and their scalars updated,
versions counted. `--save` puts the figures beside those of other machines: performance_page.py.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import LAST_CACHE, Times, after_backward, from_memory, in_turn
from models import resnet50
from performance_page import (
    ENGINE,
    FAMILY,
    OURS,
    PLAIN,
    SGD,
    UNKNOWN,
    figures,
    known,
    record,
    tables,
)
from plain import FLAGS, PlainLoops

import asgd_fast
from asgd_fast import ASGD, ArrayASGD, _core, asgd_
from asgd_fast._rows.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

AVERAGING = "asgd_fast, averaging"

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


def large(plain: PlainLoops) -> dict[str, Times]:
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
            is_cached = 12 * n <= LAST_CACHE
            if is_cached:
                contenders[ENGINE] = engine(
                    p, p.grad, None if phase == "lazy" else ax, torch.get_num_threads()
                )
            measure = in_turn if is_cached else from_memory
            results[f"{n:,} float32, {phase}, {width} B"] = measure(
                contenders, max(15, min(60, 4 * 10**8 // n))
            )
    return results


def dtypes(plain: PlainLoops) -> dict[str, Times]:
    """One tensor of 10 million elements of each other dtype, in each phase."""
    results = {}
    n = 10**7
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
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
            name = str(dtype).removeprefix("torch.")
            results[f"{n:,} {name}, {phase}, {width * p.itemsize // 4} B"] = from_memory(
                contenders, 30
            )
    return results


def averages(plain: PlainLoops) -> dict[str, Times]:
    """Wide averages, averages of each tenth iterate, and averages put to use."""
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

    cases: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
        "float32 in float64, averaging, 28 B": partial(wide, torch.float32, torch.float64),
        "bfloat16 in float32, averaging, 14 B": partial(wide, torch.bfloat16, torch.float32),
        "float32, average_every=10, ten steps, 128 B": each_tenth,
        "float32, averaged_parameters, in and out, 32 B": swapped,
    }
    return {f"{n:,} {title}": from_memory(contenders(), 30) for title, contenders in cases.items()}


def repeated(call: Callable[[], object], times: int) -> None:
    """Make a call so many times."""
    for _ in range(times):
        call()


def backward(_: PlainLoops) -> dict[str, Times]:
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
        results[title] = after_backward(optimizers, params, 41)
    torch.set_num_threads(everyone)
    return results


def hot(_: PlainLoops) -> dict[str, Times]:
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
        results[title] = in_turn(contenders, 21)
    return results


def arrays(_: PlainLoops) -> dict[str, Times]:
    """Update small arrays, without torch's optimizer around it; one thread."""
    results = {}
    everyone = torch.get_num_threads()
    torch.set_num_threads(1)
    for title, sizes in {"1,000 arrays of 64": [64] * 1000, "1 array of 64": [64]}.items():
        params, grads, axs = ([torch.randn(n) for n in sizes] for _ in range(3))
        as_numpy = [[x.numpy() for x in arrays] for arrays in (params, grads, axs)]
        lazy, averaging = (ArrayASGD(as_numpy[0], t0=t0) for t0 in (1e6, 0))
        for _step in range(3):
            averaging.step(as_numpy[1])
        contenders: dict[str, Callable[[], object]] = {
            "asgd_, NumPy, no average": partial(asgd_, *as_numpy[:2], eta=0.01),
            "asgd_, NumPy": partial(asgd_, *as_numpy, eta=0.01, mu=0.1),
            "ArrayASGD.step, NumPy, lazy": partial(lazy.step, as_numpy[1]),
            "ArrayASGD.step, NumPy, averaging": partial(averaging.step, as_numpy[1]),
            "asgd_, torch, no average": partial(asgd_, params, grads, eta=0.01),
            "asgd_, torch": partial(asgd_, params, grads, axs, eta=0.01, mu=0.1),
        }
        results[f"{title}, hot"] = in_turn(contenders, 21)
        results[f"{title}, caches cold"] = from_memory(contenders, 41)
    torch.set_num_threads(everyone)
    return results


def classifier(_: PlainLoops) -> dict[str, Times]:
    """Logistic regression, a step for each sample, beside scikit-learn's averaged SGD; one thread.

    Ours computes the gradient in NumPy and pays for the calls; theirs is compiled whole. The scale
    is the calls alone: of the step, of a ufunc on an array of the same size, of an empty function.
    """
    import numpy as np
    from sklearn import config_context
    from sklearn.linear_model import SGDClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    def empty() -> None:
        pass

    results = {}
    rng = np.random.default_rng(0)
    for n_features in (10, 100, 1000, 10_000, 100_000):
        n_samples = max(20, min(1000, 10**6 // n_features))
        xs = rng.normal(size=(n_samples, n_features))
        ys = np.where(xs[:, 0] > 0, 1.0, -1.0)
        # With this rate no step enlarges a difference between two weights: that would take
        # lr * |x|^2 > 8, and it is about 1, at most 3.
        lr = 1 / n_features
        weights, scratch = np.zeros(n_features), np.zeros(n_features)
        # From t0 = -1 on, ours averages all iterates, as theirs does; t0 = 0 leaves the first out.
        ours, alone = (ArrayASGD(w, lr=lr, lambd=0.0, alpha=0.0, t0=-1) for w in (weights, scratch))
        theirs, theirs_plain = (
            SGDClassifier(
                loss="log_loss",
                penalty=None,
                learning_rate="constant",
                eta0=lr,
                average=average,
                shuffle=False,
                fit_intercept=False,
            )
            for average in (True, False)
        )

        def epoch(
            optimizer: ArrayASGD = ours,
            weights: np.ndarray = weights,
            xs: np.ndarray = xs,
            ys: np.ndarray = ys,
        ) -> None:
            for x, y in zip(xs, ys, strict=True):
                optimizer.step((0.5 * y * (np.tanh(0.5 * y * (x @ weights)) - 1)) * x)

        step = partial(alone.step, xs[0])
        add = partial(np.add, xs[0], xs[0], scratch)
        # The limit is that of BLAS and of the engine. scikit-learn need not look for NaN.
        with threadpool_limits(1), config_context(assume_finite=True):
            assert asgd_fast.get_num_threads() == 1
            epoch()
            for model in (theirs, theirs_plain):
                model.partial_fit(xs, ys, classes=[-1, 1])
            # The same problem: without averages, coef_ has the iterate. The products of all samples
            # make at most 2 million roundings, each of 1.1e-16 of the largest weight: 2e-10.
            for own, other in ((weights, theirs_plain), (ours.averages[0], theirs)):
                assert abs(own - other.coef_[0]).max() <= 1e-9 * abs(own).max()
            times = in_turn(
                {
                    "ArrayASGD": epoch,
                    "SGDClassifier(average=True)": partial(theirs.partial_fit, xs, ys),
                    "ArrayASGD.step alone": partial(repeated, step, n_samples),
                    "np.add": partial(repeated, add, n_samples),
                    "a Python call": partial(repeated, empty, n_samples),
                },
                15,
            )
        results[f"{n_features:,} features"] = _divided(times, n_samples)
    return results


def scaling(plain: PlainLoops) -> dict[str, Times]:
    """Time an element over sizes, with one thread and with all."""
    results = {}
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
        results[f"{n:,}"] = _divided(times, n)
    return results


def threads(_: PlainLoops) -> dict[str, Times]:
    """When a second thread is worth its start: awake, and asleep as after work of one thread."""
    results = {}
    everyone = torch.get_num_threads()
    awake = torch.zeros(1 << 19)

    def wake() -> None:
        awake.add_(1)  # what torch does in a training loop all the time

    def sleep() -> None:
        time.sleep(0.01)  # longer than a runtime's threads wait for work

    for kib in (64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 16384):
        p, g = (torch.randn(kib * 256) for _ in range(2))
        contenders = {
            f"{threads}, {state}": (before, engine(p, g, None, threads))
            for state, before in (("awake", wake), ("asleep", sleep))
            for threads in (1, everyone)
        }
        times: Times = {name: [] for name in contenders}
        for _round in range(41):
            for name, (before, step) in contenders.items():
                before()
                start = time.perf_counter_ns()
                step()
                times[name].append(time.perf_counter_ns() - start)
        results[f"{kib:,} KiB"] = times
    return results


def engine(p: Tensor, g: Tensor, ax: Tensor | None, n_threads: int) -> Callable[[], object]:
    """Return a step of the engine alone, its rows gathered already."""
    rows = Rows(("param", "grad", "average"))
    axs = None if ax is None else [ax]
    rows.extend([p.detach()], [g], axs, eta=0.01, mu=1.0 if ax is None else 0.1)
    return partial(_core.update, rows, n_threads)


def _divided(times: Times, n: int) -> Times:
    """Return the times of one of n things."""
    return {name: [x / n for x in rounds] for name, rounds in times.items()}


_SECTIONS = (large, dtypes, averages, backward, hot, arrays, classifier, scaling, threads)
SECTIONS = {section.__name__: section for section in _SECTIONS}


def main() -> None:
    """Measure, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--save", type=Path, help="a folder, as docs, for performance.json, .md, .png"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; expected any of {', '.join(SECTIONS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sections = arguments.sections or list(SECTIONS)

    facts = asgd_fast.show_config("dicts")
    machine = {
        **_processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "last cache": f"{LAST_CACHE / 2**20:.0f} MiB",
        "simd": facts["cpu"]["simd"],
        "compiler": facts["build"]["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "plain loops": " ".join(FLAGS),
    }
    if arguments.save:
        # All that would be refused after the campaign is refused before it.
        best = _core.simd_levels()[0]
        if machine["simd"] != best:
            parser.error(
                f"--save: {machine['simd']} is in use, and this processor has {best}; "
                "unset ASGD_FAST_SIMD"
            )
        try:
            known(arguments.save, machine, sections)
        except ValueError as e:
            parser.error(f"--save: {e}")
        arguments.save.mkdir(exist_ok=True)
    commit = _commit() if arguments.save else ""
    for name, value in machine.items():
        print(f"- {name}: {value}")
    plain = PlainLoops()
    measured = {}
    for name in sections:
        measured[name] = figures(name, SECTIONS[name](plain))
        here = {"sections": {name: {"cases": measured[name]}}}
        print(f"\n### {name}\n", *tables(name, {machine["simd"]: here}), sep="\n", flush=True)
    if arguments.save:
        record(arguments.save, machine, commit, measured)


def _commit() -> str:
    """Return the commit that is measured, marked where files that it has are changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def _processor() -> dict[str, str]:
    """Return what the system tells of the processor: its name, and what tells it from others."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"processor": platform.processor(), FAMILY: UNKNOWN}
    # The last core's, as that of all.
    found = dict(re.findall(r"^(.*?)\t*: (.*)$", text, re.MULTILINE))
    family = [found.get(name, UNKNOWN) for name in ("cpu family", "model", "stepping")]
    return {
        "processor": found.get("model name", UNKNOWN),
        FAMILY: UNKNOWN if UNKNOWN in family else "/".join(family),
    }


if __name__ == "__main__":
    main()
