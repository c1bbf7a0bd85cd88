"""The torch optimizer beside the one it replaces: the same params, gradients and hyperparameters.

torch.optim.ASGD(foreach=False) is the oracle: whatever it computes, ours must have the same bits.
"""

from __future__ import annotations

import pytest
import torch

from asgd_fast import ASGD

NAMES = ("step", "eta", "mu", "ax")

# A state is sealed until somebody looks into it, and open from then on.
sealed_or_open = pytest.mark.parametrize("looks", [False, True], ids=["sealed", "open"])


class Twins:
    """Our optimizer and torch's, over copies of the same params.

    With `looks`, our states are looked into after each check.
    """

    def __init__(self, params, groups=None, lazy_average=True, looks=False, **options):
        self.looks = looks
        self.params = list(params)
        self.theirs_params = [twin(p) for p in self.params]
        pick = groups or (lambda own: own)
        self.ours = ASGD(pick(self.params), lazy_average=lazy_average, **options)
        self.theirs = torch.optim.ASGD(pick(self.theirs_params), **{"foreach": False, **options})

    @property
    def sides(self):
        """Each optimizer with its params."""
        return (self.ours, self.params), (self.theirs, self.theirs_params)

    def set_grads(self, grads):
        """Give both the same gradients, None among them if wanted."""
        for ours, theirs, grad in zip(self.params, self.theirs_params, grads, strict=True):
            ours.grad = grad
            theirs.grad = None if grad is None else grad.clone()

    def random_grads(self, skip=lambda _: False):
        """A random gradient for each param, but those whose index is to be skipped."""
        return [None if skip(i) else torch.randn_like(p) for i, p in enumerate(self.params)]

    def step(self, grads=None):
        self.set_grads(self.random_grads() if grads is None else grads)
        self.ours.step()
        self.theirs.step()

    def run(self, steps, skip=lambda _step, _index: False):
        for k in range(steps):
            self.step(self.random_grads(lambda i, k=k: skip(k, i)))
            self.check()

    def look(self):
        """Look into each state of ours, as loggers do: its scalars are tensors from then on."""
        for entry in self.ours.state.values():
            assert {*NAMES} >= entry.keys() >= {*NAMES} - {"ax"}

    def check(self):
        """Assert that params and state have the same bits, shapes, dtypes and layouts.

        The state is read as a checkpoint has it, so that nobody looks into it.
        """
        ours_entries, theirs_entries = (entries_of(x) for x in (self.ours, self.theirs))
        for ours, theirs in zip(self.params, self.theirs_params, strict=True):
            same(ours, theirs)
            assert (ours in ours_entries) == (theirs in theirs_entries)
            if theirs in theirs_entries:
                assert list(ours_entries[ours]) == list(theirs_entries[theirs])
                for name in NAMES:
                    same(ours_entries[ours][name], theirs_entries[theirs][name])
        if self.looks:
            self.look()


def entries_of(optimizer):
    """The entries of an optimizer's checkpoint by param."""
    params = []  # in the order of their numbers in a checkpoint
    for group in optimizer.param_groups:
        params += [p for p in group["params"] if not any(p is q for q in params)]
    if not all(any(p is q for q in params) for p in optimizer.state):  # a group was taken out
        return {p: {name: entry[name] for name in NAMES} for p, entry in optimizer.state.items()}
    return {params[i]: entry for i, entry in optimizer.state_dict()["state"].items()}


def twin(param):
    """A copy of a param in its layout."""
    data = torch.empty_strided(param.size(), param.stride(), dtype=param.dtype)
    return torch.nn.Parameter(data.copy_(param.detach()))


def same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.device == theirs.device
    assert ours.shape == theirs.shape
    assert ours.stride() == theirs.stride()
    ours, theirs = (bits(x.detach()) for x in (ours, theirs))
    assert torch.equal(ours, theirs)


def bits(tensor):
    """The bits of a tensor as integers, so that nan equals itself and -0 does not equal 0."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.contiguous().view(integer)


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes
    ]
