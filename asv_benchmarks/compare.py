"""Compare the step of asgd_fast.ASGD with those of torch's optimizers, in turn in one process.

    python asv_benchmarks/compare.py [--params 1000] [--elements 64]

Every round times each optimizer once, one after the other, so that whatever else the machine does
falls on all of them; the medians over the rounds and their ratios are printed. A step is timed
whole: hooks and profiler range, gradients gathered, params, averages and their scalars updated,
versions counted. Gradients either stay the same tensors, as with zero_grad(set_to_none=False), or
are new ones for each step, as zero_grad() and backward() leave them.
"""

from __future__ import annotations

import argparse
import platform
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING

import torch

from asgd_fast import ASGD

if TYPE_CHECKING:
    from collections.abc import Callable

# Averaging from the start, so that every step of ASGD does all that it ever does.
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "asgd_fast.ASGD": lambda params: ASGD(params, t0=0),
    "torch.optim.ASGD": lambda params: torch.optim.ASGD(params, t0=0),
    "torch.optim.ASGD(foreach=True)": lambda params: torch.optim.ASGD(params, t0=0, foreach=True),
    "torch.optim.SGD(fused=True)": lambda params: torch.optim.SGD(params, lr=1e-3, fused=True),
    "torch.optim.SGD(foreach=True)": lambda params: torch.optim.SGD(params, lr=1e-3, foreach=True),
}


class Case:
    """An optimizer over params of its own."""

    def __init__(self, name: str, n_params: int, n_elements: int) -> None:
        torch.manual_seed(0)
        self.params: list[torch.Tensor] = [
            torch.nn.Parameter(torch.randn(n_elements)) for _ in range(n_params)
        ]
        self.optimizer = OPTIMIZERS[name](self.params)

    def renew_grads(self) -> None:
        """Give each param a new gradient."""
        for param in self.params:
            param.grad = torch.randn_like(param)

    def steps(self, n: int, *, fresh: bool) -> float:
        """Return the nanoseconds of one step, the median of `n`."""
        times = []
        for _ in range(n):
            if fresh:
                self.renew_grads()
            start = perf_counter_ns()
            self.optimizer.step()
            times.append(perf_counter_ns() - start)
        return median(times)


def main() -> None:
    """Measure, and print a table for each kind of gradients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=int, default=1000, help="default: 1000")
    parser.add_argument("--elements", type=int, default=64, help="of each (default: 64)")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.params} params of {arguments.elements} float32, torch {torch.__version__}, "
        f"{arguments.threads} of {torch.multiprocessing.cpu_count()} threads, "
        f"{platform.machine()}, Python {platform.python_version()}"
    )
    for fresh, title in ((False, "gradients that stay"), (True, "new gradients for each step")):
        cases = {name: Case(name, arguments.params, arguments.elements) for name in OPTIMIZERS}
        times: dict[str, list[float]] = {name: [] for name in cases}
        for case in cases.values():
            case.renew_grads()
            case.steps(3, fresh=fresh)
        for _ in range(arguments.rounds):
            for name, case in cases.items():
                # What takes 50 times as long is steady with fewer steps.
                n = 3 if name.startswith("torch.optim.ASGD") else 30
                times[name].append(case.steps(n, fresh=fresh))
        print(f"{title}:")
        ours = median(times["asgd_fast.ASGD"])
        for name, each in times.items():
            print(
                f"  {name:<32}{median(each) / 1e3:10.1f} us a step"
                f"{median(each) / arguments.params:10.0f} ns a param"
                f"{median(each) / ours:8.1f} x"
            )


if __name__ == "__main__":
    main()
