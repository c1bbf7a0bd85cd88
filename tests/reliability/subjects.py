"""Optimizers of both faces that do by themselves what a campaign interrupts or takes memory from.

What they do follows from the number of their step, so that two of them can be compared.
"""

from __future__ import annotations

import numpy as np

import asgd_fast

try:
    import torch
except ImportError:
    torch = None

OPTIONS = {"lr": 0.1, "lambd": 0.01, "t0": 2.0, "weight_decay": 0.01}
# Step number 4, after 3 others, makes the averages.
MOMENTS = {"the first step": 0, "the step that makes the averages": 3, "a later step": 5}
SHAPES = [(), (5,), (3, 4), (1000,), (0, 2)] + [(7,)] * 20
FEW_SHAPES = [(), (3, 4), (0, 2), (50,)]


class Arrays:
    """ArrayASGD, its step number k with gradients that follow from k."""

    def __init__(self, shapes=SHAPES, **options):
        self.params = [np.full(shape, 1.0 + i) for i, shape in enumerate(shapes)]
        self.optimizer = asgd_fast.ArrayASGD(self.params, **{**OPTIONS, **options})

    def new_group(self):
        """Return a group that can be added."""
        return {"params": [np.full(i, 9.0) for i in range(4)], "t0": 1.0}

    def set_grads(self, k):
        self.grads = [np.full(x.shape, np.cos(k + i)) for i, x in enumerate(self.params)]

    def step(self):
        self.optimizer.step(self.grads)

    def look(self):
        """Look into the state, which may be kept otherwise from then on."""
        return self.optimizer.averages

    def facts(self):
        """Return the bits of all params and of the checkpoint."""
        state = self.optimizer.state_dict()
        params = [x for group in self.optimizer.param_groups for x in group["params"]]
        return [x.tobytes() for x in (*params, *state.values())]


class Tensors:
    """The same of ASGD."""

    def __init__(self, shapes=SHAPES, **options):
        self.params = [
            torch.nn.Parameter(torch.full(shape, 1.0 + i)) for i, shape in enumerate(shapes)
        ]
        self.optimizer = asgd_fast.ASGD(self.params, **{**OPTIONS, **options})

    def new_group(self):
        return {"params": [torch.nn.Parameter(torch.full((i,), 9.0)) for i in range(4)], "t0": 1.0}

    def set_grads(self, k):
        for i, p in enumerate(self.params):
            # By NumPy: torch's own threads are waited for in vain in a forked process.
            p.grad = torch.from_numpy(np.full(p.shape, np.cos(k + i), np.float32))

    def step(self):
        self.optimizer.step()

    def look(self):
        return [entry.keys() for entry in self.optimizer.state.values()]

    def facts(self):
        state = self.optimizer.state_dict()
        found = [
            p.detach().numpy().tobytes() for g in self.optimizer.param_groups for p in g["params"]
        ]
        for key, entry in state["state"].items():
            found += [(key, name, x.detach().numpy().tobytes()) for name, x in entry.items()]
        return [*found, [sorted(group.items(), key=str) for group in state["param_groups"]]]


FACES = {"ArrayASGD": Arrays} if torch is None else {"ArrayASGD": Arrays, "ASGD": Tensors}


def prepared(face, steps, *, looks=False, grows=False, **options):
    """Return a subject that has made so many steps, with gradients for the next one.

    With `looks`, its state is looked into after each; with `grows`, it then gets more params.
    """
    subject = FACES[face](**options)
    for k in range(steps):
        subject.set_grads(k)
        subject.step()
        if looks:
            subject.look()
    if grows:
        group = subject.new_group()
        subject.optimizer.add_param_group(group)
        subject.params += group["params"]
    subject.set_grads(steps)
    return subject
