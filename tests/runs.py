"""Runs of either optimizer that know each iterate made, so that an average is a plain mean."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from oracle import weights_of
from torch import nn

from asgd_fast import ASGD, ArrayASGD

OPTIONS = {"lr": 0.3, "lambd": 1e-2}


class TorchRun:
    """An optimizer of torch params over random gradients, and every iterate that it made."""

    make = staticmethod(ASGD)

    def __init__(self, *shapes, groups=lambda own: own, dtype=torch.float64, **options):
        self.params = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
        self.optimizer = self.make(groups(self.params), **{**OPTIONS, **options})
        self.iterates = [[] for _ in self.params]

    def step(self, *skipped):
        for i, p in enumerate(self.params):
            p.grad = None if i in skipped else torch.randn_like(p)
        self.optimizer.step()
        self._note(skipped)

    def _note(self, skipped):
        for i, made in enumerate(self.iterates):
            if i not in skipped:
                made.append(self.value(i))

    def value(self, i):
        return self.params[i].detach().numpy().copy()

    def average(self, i):
        return self.optimizer.state[self.params[i]]["ax"].detach().numpy()

    def check(self, *firsts, every=1, averaging="mean", atol=1e-12):
        """Assert that averages are the means of the iterates from their first ones on.

        Weighted ones, if `averaging` says so.
        """
        for i, first in enumerate(firsts):
            if first is not None:
                averaged = self.iterates[i][first::every]
                weights = [float(weight) for weight in weights_of(averaging, len(averaged))]
                mean = np.average(averaged, axis=0, weights=weights)
                np.testing.assert_allclose(self.average(i), mean, rtol=0, atol=atol)


class ArrayRun(TorchRun):
    make = staticmethod(ArrayASGD)

    def __init__(self, *shapes, groups=lambda own: own, **options):
        self.params = [np.random.default_rng(i).standard_normal(s) for i, s in enumerate(shapes)]
        options.pop("lazy_average", None)
        self.optimizer = ArrayASGD(groups(self.params), **{**OPTIONS, **options})
        self.iterates = [[] for _ in self.params]

    def step(self, *skipped):
        self.optimizer.step(
            [
                None if i in skipped else np.asarray(torch.randn(x.shape).double().numpy())
                for i, x in enumerate(self.params)
            ]
        )
        self._note(skipped)

    def value(self, i):
        return self.params[i].copy()

    def average(self, i):
        return self.optimizer.averages[i]


runs = pytest.mark.parametrize("make", [TorchRun, ArrayRun], ids=["torch", "arrays"])


lazy_or_eager = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps_made_by_threads(step):
    """Return how many of 240 steps four threads have made; the others must have been refused."""
    made, refused = [], []

    def make_one():
        try:
            made.append(step())
        except RuntimeError as error:
            refused.append(str(error))

    def make_some():
        for _ in range(60):
            make_one()

    threads = [threading.Thread(target=make_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) + len(refused) == 240
    assert set(refused) <= {"step: another thread is making a step of this optimizer"}
    return len(made)


WAYS = {
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


def with_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
