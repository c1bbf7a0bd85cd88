"""A program of a user, which no one runs: mypy and pyright look at it, in `make lint`.

An error that they must find is one that they must be told to ignore.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import asgd_fast
from asgd_fast import ASGD, ArrayASGD, NonMonotonicTrigger, Schedule, asgd_

if TYPE_CHECKING:
    from asgd_fast import ASDG  # type: ignore[attr-defined]  # noqa: F401


def train_model(model: torch.nn.Module, batches: list[torch.Tensor], file: str) -> None:
    optimizer = ASGD(model.parameters(), lr=0.1, lambd=0, t0=np.float32(100), average_every=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for x in batches:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    with optimizer.averaged_parameters():
        model(batches[0])
    averages: list[torch.Tensor] = optimizer.averages
    optimizer.copy_averages_to(averages)
    torch.save((optimizer.averaged_state_dict(model), optimizer.state_dict()), file)
    is_wide: bool = optimizer.average_dtype is torch.float64
    groups = [{"params": averages, "lr": 0.1}, {"params": averages[:0], "t0": 10}]
    ASGD(groups, lr=torch.tensor(0.1), lr_schedule="current", fused_amp=is_wide)
    ASGD(averages, lr_schedule="later")  # type: ignore[arg-type]


def train_arrays(file: str) -> None:
    optimizer = ArrayASGD([np.zeros(3)], lr=np.float32(0.1), t0=10, lr_schedule="current")
    optimizer.step([None])
    schedule = Schedule(lr=1, t0=np.ones(()))
    asgd_(np.ones(3), np.ones(3), eta=schedule.eta, mu=np.float64(schedule.mu), grad_scale=1)
    ArrayASGD(np.zeros(3), lr="0.1")  # type: ignore[arg-type]
    np.savez(file, **optimizer.state_dict())
    ArrayASGD([np.zeros(3)], averaging=("ema", 0.999))
    ArrayASGD([np.zeros(3)], averaging=("ema", "0.999"))  # type: ignore[arg-type]
    trigger = NonMonotonicTrigger(optimizer)
    for loss in (1, 1.0, np.float32(1), np.ones(1)):
        trigger.step(loss)
    trigger.step("1.0")  # type: ignore[arg-type]
    asgd_fast.set_num_threads(np.int64(2))
    versions: dict[str, str] = asgd_fast.show_config("dicts")["versions"]
    versions["asgd_fast"].upper()
    asgd_fast.ASDG  # type: ignore[attr-defined]  # noqa: B018
    asgd_fast.__version__.upper()
