"""Measure how far averages are from the exact means, beside torch's.

    python asv_benchmarks/accuracy.py [--steps 1000000]

Params are set by hand in each step, and their gradients are zero, so that the iterates are known;
the means of these are computed exactly. Errors are printed in units in the last place (ulp) of the
param's dtype, the largest of 16 elements, as a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm import tqdm

from asgd_fast import ASGD

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

N_ELEMENTS = 16

DTYPES = {
    torch.float32: (torch.float64,),
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
}


def noise(steps: int) -> Tensor:
    """Return iterates that scatter about 1."""
    return 1 + 0.1 * torch.randn(steps, N_ELEMENTS, dtype=torch.float64)


def drift(steps: int) -> Tensor:
    """Return iterates that move from 1 to 1.5, and scatter."""
    line = 0.5 * torch.arange(steps, dtype=torch.float64)[:, None] / steps
    return 1 + line + 0.01 * torch.randn(steps, N_ELEMENTS, dtype=torch.float64)


ITERATES: dict[str, Callable[[int], Tensor]] = {"noise": noise, "drift": drift}


def averages(iterates: Tensor, progress: tqdm[NoReturn]) -> dict[str, Tensor]:
    """Return the averages of the iterates, by the dtype in which they were kept."""
    options: dict[str, Any] = {
        "lr": 1.0,
        "lambd": 0.0,
        "t0": -1,
    }  # averages from the first iterate on
    params = {
        name: torch.nn.Parameter(iterates[0].clone())
        for name in ("torch", "own", *map(str, DTYPES[iterates.dtype]))
    }
    optimizers: dict[str, torch.optim.ASGD] = {
        "torch": torch.optim.ASGD([params["torch"]], foreach=False, **options),
        "own": ASGD([params["own"]], **options),
    }
    for dtype in DTYPES[iterates.dtype]:
        optimizers[str(dtype)] = ASGD([params[str(dtype)]], average_dtype=dtype, **options)
    data = [param.detach() for param in params.values()]
    for param in params.values():
        param.grad = torch.zeros_like(param)
    for iterate in iterates.unbind():
        for x in data:
            x.copy_(iterate)
        for optimizer in optimizers.values():
            optimizer.step()
        progress.update()
    return {name: optimizers[name].state[params[name]]["ax"] for name in params}


def error(average: Tensor, exact: list[float], dtype: torch.dtype) -> float:
    """Return the largest error of an average, rounded to a dtype, in ulp of that."""
    digits = -int(math.log2(torch.finfo(dtype).eps))
    errors: list[float] = [
        abs(x - mean) / math.ldexp(1.0, math.frexp(mean)[1] - 1 - digits)
        for x, mean in zip(average.to(dtype).tolist(), exact, strict=True)
    ]
    return max(errors)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10**6)
    steps = parser.parse_args().steps

    rows = []
    with tqdm(total=len(ITERATES) * len(DTYPES) * steps, unit="step", mininterval=1) as progress:
        for title, make in ITERATES.items():
            for dtype, wider in DTYPES.items():
                torch.manual_seed(0)
                iterates = make(steps).to(dtype)
                exact = [math.fsum(column) / steps for column in iterates.double().T.tolist()]
                found = averages(iterates, progress)
                own = error(found["own"], exact, dtype)
                row = [
                    title,
                    str(dtype),
                    f"{error(found['torch'], exact, dtype):.3g}",
                    f"{own:.3g}",
                ]
                for average_dtype in (torch.float32, torch.float64):
                    if average_dtype in wider:
                        row.append(f"{error(found[str(average_dtype)], exact, dtype):.3g}")
                    else:
                        row.append("")
                rows.append(row)
    header = ["iterates", "params", "torch.optim.ASGD", "asgd_fast", "in float32", "in float64"]
    print(f"\nError of the average of {steps:,} iterates, in ulp of the param's dtype:\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
