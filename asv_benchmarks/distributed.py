"""Measure steps of DTensors beside torch's optimizers and beside steps of plain tensors.

    python asv_benchmarks/distributed.py

A step communicates nothing, so one process and one thread show what each rank pays, as torchrun
starts them. The params are those of models under ``fully_shard`` with CPU offload. Each step is
timed after a forward and backward pass, in turn with the others, by how long this thread had a
processor. The medians over the rounds are printed as the table of docs/distributed.md.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from asgd_fast import ASGD

if TYPE_CHECKING:
    from measure import Times

LOCAL = "ours, plain tensors"
CASES = {"300 x 64, us a param": ([64] * 300, 15, 300e3), "10 M, ms": ([10**7], 9, 1e6)}


class Squares(nn.Module):
    """Half the sum of the squares of its parameters, whose gradients equal them."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.ones(size) for size in sizes)

    def forward(self) -> Tensor:
        """Return the sum."""
        return torch.stack([torch.dot(param, param) for param in self.params]).sum() / 2


def measured(sizes: list[int], rounds: int) -> Times:
    """Return the nanoseconds of each optimizer's step in each round."""
    sharded, plain = Squares(sizes), Squares(sizes)
    fully_shard(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    params = list(sharded.parameters())
    optimizers: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
        "ours, lazy": (sharded, ASGD(params)),
        "ours, averaging": (sharded, ASGD(params, t0=0)),
        "torch's ASGD": (sharded, torch.optim.ASGD(params, t0=0, foreach=False)),
        "torch's ASGD, foreach": (sharded, torch.optim.ASGD(params, t0=0, foreach=True)),
        "torch's Adam, fused": (sharded, torch.optim.Adam(params, lr=1e-5, fused=True)),
        f"{LOCAL}, lazy": (plain, ASGD(plain.parameters())),
        f"{LOCAL}, averaging": (plain, ASGD(plain.parameters(), t0=0)),
    }
    times: Times = {name: [] for name in optimizers}
    for k in range(3 + rounds):
        for name, (model, optimizer) in optimizers.items():
            optimizer.zero_grad()
            model().backward()
            start = thread_time_ns()
            optimizer.step()
            if k >= 3:
                times[name].append(thread_time_ns() - start)
    return times


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'store')}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        gc.disable()
        columns = []
        for sizes, rounds, unit in CASES.values():
            times = measured(sizes, rounds)
            columns.append({name: median(x) / unit for name, x in times.items()})
        dist.destroy_process_group()
    print("| step |", " | ".join(CASES), "|")
    print("| --- |", " | ".join("---" for _ in CASES), "|")
    for name in columns[0]:
        print(f"| {name} |", " | ".join(f"{column[name]:.1f}" for column in columns), "|")


if __name__ == "__main__":
    main()
