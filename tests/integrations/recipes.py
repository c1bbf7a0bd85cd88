"""The examples of docs/frameworks.md, and the training that they are tried with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
EPOCHS, BATCHES, BATCH = 5, 5, 4


def run_recipe(title, names):
    """Run the example under a title in a namespace, and return that."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, f"{PAGE.name}, {title}", "exec"), names)
    return names


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


class Module(nn.Module):
    """The model for who wants a class."""

    def __init__(self):
        super().__init__()
        self.layers = model()

    def forward(self, x):
        return self.layers(x)


def pairs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    return x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator)


def loader():
    return DataLoader(TensorDataset(*pairs(BATCHES * BATCH, 1)), batch_size=BATCH)


VALIDATION = pairs(16, 2)


def validation_loader():
    return DataLoader(TensorDataset(*VALIDATION), batch_size=16)


def loss_function(output, y):
    return (output - y).square().mean()


def train(own, optimizer, batches=None):
    """One epoch."""
    for x, y in loader() if batches is None else batches:
        optimizer.zero_grad()
        loss_function(own(x), y).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(own):
    x, y = VALIDATION
    return loss_function(own(x), y).item()


def torchs(epochs=EPOCHS, **options) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The oracle: the model with the iterate of torch's ASGD and with its average, by epoch."""
    own, averaged = model(), model()
    optimizer = torch.optim.ASGD(own.parameters(), foreach=False, **options)
    for _ in range(epochs):
        train(own, optimizer)
        for p, q in zip(own.parameters(), averaged.parameters(), strict=True):
            q.detach().copy_(optimizer.state[p]["ax"])
        yield own, averaged


def same_params(ours, theirs):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
