"""Memory in use after many calls: with PYTHONMALLOC=malloc the C library counts all of it."""

from __future__ import annotations

import ctypes
import gc
import os
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
    """Yield what is called over and over, by name."""
    p, g, ax = (np.ones(40) for _ in range(3))
    yield "asgd_", lambda: asgd_fast.asgd_(p, g, ax, eta=0.1, mu=0.5)
    yield "asgd_ refused", lambda: refused(asgd_fast.asgd_, p, g[1:], ax, eta=0.1)
    yield "asgd_ of overlapping arrays", lambda: refused(asgd_fast.asgd_, p, p, eta=0.1)
    optimizer = asgd_fast.ArrayASGD([p, np.ones(3)], t0=0)
    grads = [g, np.ones(3)]
    yield "ArrayASGD.step", lambda: optimizer.step(grads)
    yield "ArrayASGD.step refused", lambda: refused(optimizer.step, [g, np.ones(4)])

    def live():
        other = asgd_fast.ArrayASGD([p, np.ones(3)], t0=0)
        go_through_all(other, lambda: other.step(grads), [np.ones(40), np.ones(3)])

    yield "a life of ArrayASGD", live
    state = optimizer.state_dict()
    bad = {**state, "mu": state["mu"] + 2}
    yield "load_state_dict refused", lambda: refused(optimizer.load_state_dict, bad)


def borrowed_calls():
    """Arrays of fake libraries, which are kept here, so that only what we keep grows."""
    for kind in (exporters.Versioned, exporters.Legacy, exporters.ExchangeManagedOnly):
        param, grad = kind(np.ones(4)), kind(np.ones(4))

        def call(param=param, grad=grad):
            asgd_fast.asgd_(param, grad, eta=0.1)
            for x in (param, grad):
                x.capsules.clear()
                x.loans.clear()
                x.asked.clear()
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
    params = [torch.nn.Parameter(torch.ones(n)) for n in (40, 3)]
    optimizer = asgd_fast.ASGD(params, t0=0)

    def step(optimizer=optimizer):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    yield "ASGD.step", step

    def live():
        other = asgd_fast.ASGD(params, t0=0)
        go_through_all(other, lambda: step(other), [torch.ones(40), torch.ones(3)])

    yield "a life of ASGD", live


def measure(n, kept):
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
                if kept is not None and name == "ArrayASGD.step":
                    kept.append(np.ones(1))
            rounds.append((in_use() - before) / n)
        grown[name] = min(rounds)
    return grown


def check(n, keeps):
    """Print the calls made; fail for what grows with them.

    A block of the C library has 32 bytes at least; its own bookkeeping varies by less a call.
    """
    grown = measure(n, [] if keeps else None)
    found = {name: round(x, 1) for name, x in grown.items() if x >= 16}
    assert not found, f"bytes a call: {found}"
    print(3 * n * len(grown))


_keeps = False


def run(campaign):
    n = max(2_000, campaign.times(5_000))
    program = f"from reliability import leaks; leaks.check({n}, {_keeps})"
    environment = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"}
    path = os.environ.get("PYTHONPATH", "")
    printed = python(program, timeout=1200, PYTHONPATH=path, **environment)
    campaign.counts["calls after which no memory stays"] += int(printed)


@contextmanager
def _keeping():
    global _keeps
    _keeps = True
    try:
        yield
    finally:
        _keeps = False


CONTROLS = {"an array that a step keeps": _keeping}
