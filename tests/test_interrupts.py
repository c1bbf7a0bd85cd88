"""Interrupts around averaged_parameters(): no bit of params, averages and scalars is lost."""

from __future__ import annotations

import gc
import signal

import numpy as np
import pytest
import torch
from averaging import LAYOUTS, OPTIONS, facts, raw, run, step, stepped
from torch import nn
from twins import parameters

from asgd_fast import ArrayASGD, _core
from asgd_fast._torch import averages as _averages

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def interruptible():
    """Even where signals are ignored, as in the background of a script."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupting(function, at, before):
    """A function whose call number `at` is interrupted, before or after it has done its work."""
    calls = iter(range(100))

    def wrapper(*arguments):
        now = next(calls) == at
        if now and before:
            signal.raise_signal(signal.SIGINT)
        result = function(*arguments)
        if now:
            signal.raise_signal(signal.SIGINT)
        return result

    return wrapper


PLACES = {
    "before the pass in": (_core, "exchange", 0, True),
    "after the pass in": (_core, "exchange", 0, False),
    "before the state is told": (_averages, "_put_averages", 0, True),
    "after the state is told": (_averages, "_put_averages", 0, False),
    "before autograd is told": (_averages, "increment_versions", 0, True),
    "before the pass out": (_core, "exchange", 1, True),
    "after the pass out": (_core, "exchange", 1, False),
    "before autograd is told on the way out": (_averages, "increment_versions", 1, True),
    "after autograd is told on the way out": (_averages, "increment_versions", 1, False),
    "before the state is told on the way out": (_averages, "_put_back", 0, True),
    "after the state is told on the way out": (_averages, "_put_back", 0, False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", [LAYOUTS["contiguous"], LAYOUTS["columns"]], ids=["", "gappy"])
def test_an_interrupt_loses_nothing(interruptible, monkeypatch, make, wide, place):
    params = [nn.Parameter(make()), *parameters((40,))]
    optimizer = stepped(params, average_dtype=wide)
    before = facts(optimizer)
    module, name, at, is_before = PLACES[place]

    def evaluate():
        with optimizer.averaged_parameters():
            pass

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupting(getattr(module, name), at, is_before))
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    assert facts(optimizer) == before
    with optimizer.averaged_parameters():  # it is outside again
        assert not torch.equal(params[0], torch.zeros_like(params[0]))
    step(optimizer, params)


def test_an_interrupt_inside(interruptible):
    params = parameters((3,), (4, 5))
    optimizer = stepped(params)
    before = facts(optimizer)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged_parameters():
        signal.raise_signal(signal.SIGINT)
    assert facts(optimizer) == before


def test_a_context_that_is_dropped_puts_everything_back():
    params = parameters((3,))
    optimizer = stepped(params)
    before = facts(optimizer)
    context = optimizer.averaged_parameters()
    context.__enter__()
    assert facts(optimizer) != before
    del context
    gc.collect()
    assert facts(optimizer) == before


ARRAY_PLACES = {
    "before the pass in": (0, True),
    "after the pass in": (0, False),
    "before the pass out": (1, True),
    "after the pass out": (1, False),
}


@pytest.mark.parametrize("place", ARRAY_PLACES)
@pytest.mark.parametrize("wide", [None, "float64"])
def test_an_interrupt_loses_no_arrays(interruptible, monkeypatch, wide, place):
    arrays = [np.arange(5.0), np.arange(7.0, dtype=np.float32)]
    optimizer = ArrayASGD(arrays, average_dtype=wide, **OPTIONS)
    run(optimizer, arrays)
    before = [raw(x) for x in (*arrays, *optimizer.averages)]

    def evaluate():
        with optimizer.averaged_parameters():
            pass

    with monkeypatch.context() as patch:
        patch.setattr(_core, "exchange", interrupting(_core.exchange, *ARRAY_PLACES[place]))
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    assert [raw(x) for x in (*arrays, *optimizer.averages)] == before
    run(optimizer, arrays, 1)
