"""Memory in use after many calls: with PYTHONMALLOC=malloc the C library counts all of it."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
from contextlib import contextmanager

import exporters
import numpy as np

import asgd_fast
from reliability.capsules import LIES, array_of, forget_loans, quiet
from reliability.common import python

try:
    import torch
except ImportError:
    torch = None


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def in_use():
    """Return the bytes that the C library has lent."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (TypeError, ValueError, BufferError):
        return
    raise AssertionError("accepted what must be refused")


def go_through_all(optimizer, step, targets):
    """Do with an optimizer what can be done with it."""
    for _ in range(4):
        step()
    with optimizer.averaged_parameters():
        optimizer.state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.start_averaging()
    optimizer.copy_averages_to(targets)


def array_calls():
    """Yield what is called over and over, by name.

    With new arrays each time: a reference too many to one that is there anyway takes no memory.
    """

    def new(*sizes):
        return [np.ones(n) for n in sizes]

    yield "asgd_", lambda: asgd_fast.asgd_(*new(40, 40, 40), eta=0.1, mu=0.5)
    yield "asgd_ refused", lambda: refused(asgd_fast.asgd_, *new(40, 39, 40), eta=0.1)
    yield "asgd_ of overlapping arrays", lambda: refused(asgd_fast.asgd_, *new(40) * 2, eta=0.1)
    optimizer = asgd_fast.ArrayASGD(new(40, 3), t0=0)
    yield "ArrayASGD.step", lambda: optimizer.step(new(40, 3))
    yield "ArrayASGD.step refused", lambda: refused(optimizer.step, new(40, 4))

    def live():
        other = asgd_fast.ArrayASGD(new(40, 3), t0=0)
        other.add_param_group({"params": new(5)})
        refused(other.add_param_group, {"params": new(5), "lr": -1})
        go_through_all(other, lambda: other.step(new(40, 3, 5)), new(40, 3, 5))
        copy.deepcopy(other)
        pickle.loads(pickle.dumps(other))

    yield "a life of ArrayASGD", live
    state = optimizer.state_dict()
    bad = {**state, "mu": state["mu"] + 2}
    yield "load_state_dict refused", lambda: refused(optimizer.load_state_dict, bad)


def borrowed_calls():
    """Arrays of fake libraries, whose own notes are torn up, so that only what we keep grows."""
    for kind in (exporters.Versioned, exporters.Legacy, exporters.ExchangeManagedOnly):

        def call(kind=kind):
            asgd_fast.asgd_(kind(np.ones(4)), kind(np.ones(4)), eta=0.1)
            forget_loans()

        yield f"asgd_ of {kind.__name__}", call
    lying = array_of(exporters.Versioned, np.ones(4), lie=LIES["a negative size"], forgets=True)

    def lie():
        with quiet():
            refused(asgd_fast.asgd_, lying, exporters.Versioned(np.ones(4)), eta=0.1)
        lying.lies = ()
        for x in (lying.capsules, lying.loans, lying.asked):
            x.clear()
        forget_loans()

    yield "asgd_ of a lie", lie


def torch_calls():
    def new():
        return [torch.nn.Parameter(torch.ones(n)) for n in (40, 3)]

    def step(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()

    optimizer = asgd_fast.ASGD(new(), t0=0)
    yield "ASGD.step", lambda: step(optimizer)

    def refused_step():
        optimizer.param_groups[0]["alpha"] = -1.0
        refused(step, optimizer)
        optimizer.param_groups[0]["alpha"] = 0.75

    yield "ASGD.step refused", refused_step

    def live():
        other = asgd_fast.ASGD(new(), t0=0)
        go_through_all(other, lambda: step(other), [torch.ones(40), torch.ones(3)])

    yield "a life of ASGD", live
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["alpha"] = -1.0
    yield "ASGD.load_state_dict refused", lambda: refused(optimizer.load_state_dict, bad)


def plant(fault):
    """Let each call keep something."""
    update, make_step, kept = asgd_fast.asgd_, asgd_fast.ArrayASGD.step, []

    def asgd_(param, *arrays, **scalars):
        update(param, *arrays, **scalars)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(param))

    def step(self, grads):
        make_step(self, grads)
        kept.append(np.ones(1))

    if fault == "a reference":
        asgd_fast.asgd_ = asgd_
    elif fault == "an array":
        asgd_fast.ArrayASGD.step = step


def measure(n):
    """Call each n times, and return by how many bytes a call each grew.

    Memory that a cache takes once is not a leak: the least growth of several rounds counts.
    """
    grown = {}
    calls = [*array_calls(), *borrowed_calls(), *([] if torch is None else torch_calls())]
    for name, call in calls:
        for _ in range(50):
            call()
        rounds = []
        for _ in range(3):
            before = in_use()
            for _ in range(n):
                call()
            rounds.append((in_use() - before) / n)
        grown[name] = min(rounds)
    return grown


def check(n, fault):
    """Print the calls made; fail for what grows with them.

    A block of the C library has 32 bytes at least; its own bookkeeping varies by less a call.
    """
    plant(fault)
    grown = measure(n)
    found = {name: round(x, 1) for name, x in grown.items() if x >= 16}
    assert not found, f"bytes a call: {found}"
    print(3 * n * len(grown))


_fault = None


def run(campaign):
    n = max(2_000, campaign.times(5_000))
    program = f"from reliability import leaks; leaks.check({n}, {_fault!r})"
    environment = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"}
    path = os.environ.get("PYTHONPATH", "")
    printed = python(program, timeout=1200, PYTHONPATH=path, **environment)
    campaign.counts["calls after which no memory stays"] += int(printed)


@contextmanager
def _keeping(fault):
    global _fault
    _fault = fault
    try:
        yield
    finally:
        _fault = None


CONTROLS = {
    "an array that a step keeps": lambda: _keeping("an array"),
    "a reference to its param that asgd_ keeps": lambda: _keeping("a reference"),
}
