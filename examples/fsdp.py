"""Train a small network that several processes share, and go on after one of them was killed.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 1 examples/fsdp.py --folder fsdp --kill-at 70

All processes save a checkpoint together, every 50 steps. With --kill-at one of them is killed in
that step. torchrun then starts all of them anew, and they go on from the last checkpoint to the
bits that the run has without it. Another number of processes can go on from there, too. Without the
variable, processes that are started anew may find the addresses of those before them in the store
that torchrun shares with them (pytorch/pytorch#135712), and fail to connect.
"""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from asgd_fast import ASGD

FEATURES = 16
BATCH = 32  # of all processes together
EVERY = 50  # steps between checkpoints


class Training:
    """What a checkpoint holds: a sharded network, its optimizer, and the number of steps made."""

    def __init__(self) -> None:
        torch.manual_seed(0)  # so that all processes make the same network, to keep their parts
        self.model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 1))
        fully_shard(self.model)
        self.optimizer = ASGD(self.model.parameters(), lr=0.1, lambd=0.0, t0=EVERY)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the part of this process, in the form that any number of processes can load."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the part of this process."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.steps = state_dict["steps"]

    def step(self) -> None:
        """Learn from this process's share of a batch."""
        x, y = (tensor.tensor_split(dist.get_world_size()) for tensor in examples(self.steps))
        self.optimizer.zero_grad()
        rank = dist.get_rank()
        nn.functional.mse_loss(self.model(x[rank]), y[rank]).backward()
        self.optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss on examples that are not trained on; all processes must call."""
        x, y = examples(-1, n=1000)
        return float(nn.functional.mse_loss(self.model(x), y))


def examples(seed: int, n: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return noisy examples, the same for each call with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator)
    return x, x.sin().mean(dim=1, keepdim=True) + torch.randn(n, 1, generator=generator)


def save(training: Training, folder: Path) -> None:
    """Save aside and rename, so that who is killed meanwhile leaves the last checkpoint whole."""
    aside = folder / "aside"
    state_dict_saver.save({"training": training}, checkpoint_id=aside)
    # It has returned, so all have written.
    if dist.get_rank() == 0:
        earlier = list(folder.glob("step-*"))
        aside.rename(folder / f"step-{training.steps:06}")
        for path in earlier:
            rmtree(path)


def load(training: Training, folder: Path) -> None:
    """Go on from the last checkpoint, if there is any."""
    checkpoints = sorted(folder.glob("step-*"))
    if checkpoints:
        state_dict_loader.load({"training": training}, checkpoint_id=checkpoints[-1])


def ship(training: Training, path: Path) -> None:
    """Save the network with its averages, as a plain one loads it; all processes must call."""
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in training.optimizer.averaged_state_dict(training.model).items()
    }
    if dist.get_rank() == 0:
        torch.save(whole, path)


def train(folder: Path, steps: int, kill_at: int | None) -> None:
    """Train from the last checkpoint on, and ship the averages."""
    training = Training()
    load(training, folder)
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"from step {training.steps} on, with {n} processes", flush=True)
    is_to_be_killed = rank == n - 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    while training.steps < steps:
        if training.steps == kill_at and is_to_be_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        training.step()
        if training.steps % EVERY == 0:
            save(training, folder)
    last = training.loss()
    with training.optimizer.averaged_parameters():
        average = training.loss()
    ship(training, folder / "averages.pt")
    if rank == 0:
        print(f"loss of the last iterate {last:.4f}, of the average {average:.4f}")


def main() -> None:
    """Train as one of the processes that torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("fsdp"), help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="number of steps (default: 200)")
    parser.add_argument("--kill-at", type=int, help="step in which the last process is killed")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    # Who waits for a process that is no more gives up, and torchrun starts all anew.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        train(arguments.folder, arguments.steps, arguments.kill_at)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
