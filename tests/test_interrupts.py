"""Interrupts of steps and around averaged_parameters(): no bit of params and state is lost."""

from __future__ import annotations

import contextlib
import dis
import gc
import signal
import sys
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from averaging import LAYOUTS, OPTIONS, STEPS, facts, raw, run, step, stepped
from reliability.subjects import FACES, MOMENTS, prepared
from torch import nn
from twins import bits, parameters

import asgd_fast
from asgd_fast import ASGD, ArrayASGD
from asgd_fast.integrations.train_eval import TrainEvalASGD

pytestmark = pytest.mark.usefixtures("seeded")

# Of the code that is interrupted: the package, what its context managers are made by, and what
# hashes tensors.
WHERE = (str(Path(asgd_fast.__file__).parent), contextlib.__file__, torch._tensor.__file__)


@pytest.fixture(autouse=True)
def interruptible():
    """Even where signals are ignored, as in the background of a script."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@cache
def instructions_of(code):
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


def interrupted(function, at):
    """Call a function; whether there was an interrupt at place number `at` of the code.

    The places are those where Python looks for signals: after calls, and where a function begins
    or a generator goes on.
    """
    places = iter(range(at + 1))
    last = {}  # the instruction before, by the ids of frames, which are not to be kept alive

    def trace(frame, event, _argument):
        if not frame.f_code.co_filename.startswith(WHERE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            instruction = instructions_of(frame.f_code).get(frame.f_lasti, "")
            before, last[id(frame)] = last.get(id(frame), ""), instruction
            looks = before.startswith("CALL") or instruction == "RESUME"
            if looks and next(places) == at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.filterwarnings("ignore::asgd_fast.AveragingNotBegunWarning")
@pytest.mark.parametrize("options", [{}, {"looks": True}, {"grows": True}], ids=str)
@pytest.mark.parametrize("steps", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("face", FACES)
def test_an_interrupted_step_is_whole_or_not_made(face, steps, options):
    def subject():
        return prepared(face, steps, shapes=[(3,), (4, 5)], **options)

    calm = subject()
    before = calm.facts()
    calm.step()
    after = calm.facts()
    for at in count():
        own = subject()
        if not interrupted(own.step, at):
            break
        if own.facts() != after:
            assert own.facts() == before, at
            own.step()
            assert own.facts() == after, at
    assert own.facts() == after
    assert at > 10


def test_an_interrupt_of_a_step_by_torch_leaves_no_mode_behind():
    whole = torch.randn(4)
    params = [nn.Parameter(whole[:3]), nn.Parameter(whole[1:])]  # which no engine takes
    optimizer = ASGD(params, **OPTIONS)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()  # after the first one all have the same places
    for at in count():
        done = not interrupted(optimizer.step, at)
        assert torch.is_grad_enabled(), at
        if done:
            break
    assert at > 10


@pytest.mark.heavy
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", [LAYOUTS["contiguous"], LAYOUTS["columns"]], ids=["", "gappy"])
def test_an_interrupt_loses_nothing(make, wide):
    params = [nn.Parameter(make()), *parameters((40,))]
    optimizer = stepped(params, average_dtype=wide)
    before = facts(optimizer)

    def evaluate():
        with optimizer.averaged_parameters():
            assert facts(optimizer) != before

    for at in count():
        if not interrupted(evaluate, at):
            break
        assert facts(optimizer) == before, at
        with optimizer.averaged_parameters():  # it is outside again
            pass
    assert at > 50
    step(optimizer, params)


@pytest.mark.heavy
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_an_interrupt_leaves_one_of_the_two_modes(wide):
    params = parameters((3,), (4, 5))
    optimizer = TrainEvalASGD(params, average_dtype=wide, **OPTIONS)
    for k in range(STEPS):
        step(optimizer, params, k)
    iterates = [bits(p.detach()).tolist() for p in params]
    averages = [bits(ax.to(torch.float32)).tolist() for ax in optimizer.averages]
    assert iterates != averages
    for at in count():
        done = not interrupted(optimizer.eval, at)
        optimizer.eval()
        assert [bits(p.detach()).tolist() for p in params] == averages, at
        done &= not interrupted(optimizer.train, at)
        optimizer.eval()
        assert [bits(p.detach()).tolist() for p in params] == averages, at
        optimizer.train()
        assert [bits(p.detach()).tolist() for p in params] == iterates, at
        if done:
            break
    assert at > 20
    step(optimizer, params)


def test_an_interrupt_inside():
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


@pytest.mark.heavy
@pytest.mark.parametrize("wide", [None, "float64"])
def test_an_interrupt_loses_no_arrays(wide):
    arrays = [np.arange(5.0), np.arange(7.0, dtype=np.float32)]
    optimizer = ArrayASGD(arrays, average_dtype=wide, **OPTIONS)
    run(optimizer, arrays)
    before = [raw(x) for x in (*arrays, *optimizer.averages)]

    def evaluate():
        with optimizer.averaged_parameters():
            assert [raw(x) for x in arrays] != before[: len(arrays)]

    for at in count():
        if not interrupted(evaluate, at):
            break
        assert [raw(x) for x in (*arrays, *optimizer.averages)] == before, at
        with optimizer.averaged_parameters():  # it is outside again
            pass
    assert at > 10
    run(optimizer, arrays, 1)
